"""Models that answer in one call, traced: a graph for each piece of `arch/pieces.py`.

Nothing here knows a model type: the class is that which the base's names were read off, its inputs
have the sizes that `arch/inputs.py` reads off its config, and its parameters keep their names, so
that pieces of one model share their weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from adaptrix_export.arch.classes import live_class
from adaptrix_export.arch.inputs import INPUTS, LENGTHS, SEQUENCE, sizes_of, taken
from adaptrix_export.arch.pieces import Piece, pieces_of
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.trace_patches import traceable
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_sample import BATCH, LENGTH, Sample
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Base, Plan
from adaptrix_export.progress import Progress

IMAGES = 3  # rows of images beside BATCH rows of text: two sizes, so two numbers
_LENGTHS = {**LENGTHS, SEQUENCE: LENGTH}


def pieces_of_base(base: Base) -> tuple[Piece, ...]:
    """The graphs that a base becomes; none where no row says how."""
    if base.skeleton is None:
        return ()
    found = live_class(base.spec, base.config, base.task)
    kind = str(base.config.get("model_type"))
    return pieces_of(kind, base.task, base.skeleton.class_name, str(found.main_input_name))


def traced_whole(plan: Plan, provider: str, progress: Progress) -> dict[str, Graph]:
    """File name -> graph, in float32. Raises what `traced` raises."""
    base = plan.base
    place = f"{base.spec}: model type {base.architecture.model_type!r}"
    found = live_class(base.spec, base.config, base.task)
    made = {}
    for piece in pieces_of_base(base):
        stage = progress.stage(f"tracing: {piece.file}")
        with traced_faults(place), traceable(base.task), stage:
            model = weightless(live_config(plan), base.task, found)
            sample = _sample(model, piece)
            _answer_as(model, piece)
            graph = export(model, sample)
        with progress.stage("tracing: simplifying the graph"):
            _name(graph, piece, model.config)
            made[piece.file] = finish(plan, graph, stored_parameters(model), provider)
    return made


def _sample(model: Any, piece: Piece) -> Sample:
    """A call with a pad in its mask: one of ones alone is dropped from a trace."""
    auto = torch.export.Dim.AUTO
    inputs: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    known = inspect.signature(getattr(model, piece.method)).parameters
    for name in taken(piece.inputs, model.config):
        if name not in known:
            continue
        sizes = sizes_of(name, model.config, type(model).__name__)
        rows = IMAGES if name == "pixel_values" and "input_ids" in piece.inputs else BATCH
        shape = (rows, *(n if isinstance(n, int) else _LENGTHS[n] for n in sizes))
        whole = INPUTS[name].integer
        inputs[name] = torch.ones(shape, dtype=torch.long) if whole else torch.zeros(shape)
        varying = [0, *(axis for axis, n in enumerate(sizes, 1) if isinstance(n, str))]
        shapes[name] = dict.fromkeys(varying, auto)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -1] = 0
    return Sample(inputs, shapes)


def _answer_as(model: Any, piece: Piece) -> None:
    """Let a call of the model be one of the piece's method, and its answer the piece's outputs."""
    method = getattr(model, piece.method)

    def forward(**given: Any) -> dict[str, Any]:
        found = method(**given)
        return {name: found[field] for name, field in piece.outputs.items()}

    model.forward = forward


def _name(model: ir.Model, piece: Piece, config: Any) -> None:
    """Inputs and outputs by their names in the row, in its order; an input that nothing reads is
    left out."""
    graph = model.graph
    _strip(graph.inputs, "input.")
    _strip(graph.outputs, "output.")
    outputs = {str(value.name): value for value in graph.outputs}
    missing = [name for name in piece.outputs if name not in outputs]
    if missing:
        raise UnsupportedError(
            piece.file, f"no output {missing[0]} among {', '.join(outputs)}", "one",
            "use --target safetensors",
        )  # fmt: skip
    graph.outputs[:] = [outputs[name] for name in piece.outputs]
    common.RemoveUnusedNodesPass()(model)
    inputs = {str(value.name): value for value in graph.inputs if value.uses()}
    graph.inputs[:] = [inputs[name] for name in piece.inputs if name in inputs]
    towers = "pixel_values" in inputs and "input_ids" in inputs
    for name, value in inputs.items():
        rows = "image_batch" if towers and name == "pixel_values" else "batch"
        value.shape = ir.Shape([rows, *sizes_of(name, config)])
    for value in graph.outputs:
        assert value.shape is not None
        length = SEQUENCE if "input_ids" in inputs and not towers else None
        sizes = [n if isinstance(n, int) else length for n in value.shape]
        if not isinstance(value.shape[0], int):
            sizes[0] = None if towers else "batch"
        value.shape = ir.Shape(sizes)


def _strip(values: Iterable[ir.Value], start: str) -> None:
    """The exporter puts `start` before a name that inputs and outputs share."""
    for value in values:
        value.name = str(value.name).removeprefix(start)
