"""Traced graphs of models without a cache: one graph for each piece in `arch/pieces.py`.

Nothing here depends on a model type. The class is the one whose module names the base uses,
`arch/inputs.py` derives the sizes of the inputs from the config, and parameters keep their names,
so that the pieces of one model share their weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from adaptrix_export.arch.classes import live_class
from adaptrix_export.arch.inputs import INPUTS, LENGTHS, SEQUENCE, accepted_inputs, sizes_of
from adaptrix_export.arch.pieces import Piece, pieces_of
from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_sample import BATCH, LENGTH, DynamicAxes, Sample
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Base, Plan
from adaptrix_export.progress import Progress

IMAGES = 3  # rows of images beside BATCH rows of text: two sizes, so two numbers
_LENGTHS = {**LENGTHS, SEQUENCE: LENGTH}


def pieces_of_base(base: Base) -> tuple[Piece, ...]:
    """The pieces that a base is split into; none where no row of `PIECES` applies."""
    if base.skeleton is None:
        return ()
    model_class = live_class(base.spec, base.config, base.task)
    kind = str(base.config.get("model_type"))
    return pieces_of(kind, base.task, base.skeleton.class_name, str(model_class.main_input_name))


def traced_whole(plan: Plan, provider: str, progress: Progress) -> dict[str, Graph]:
    """File name -> graph, in float32. Raises what `traced` raises."""
    base = plan.base
    place = f"{base.spec}: model type {base.architecture.model_type!r}"
    model_class = live_class(base.spec, base.config, base.task)
    graphs = {}
    for piece in pieces_of_base(base):
        stage = progress.stage(f"tracing: {piece.file}")
        with traced_faults(place), traceable(base.task == GENERATION), stage:
            model = weightless(live_config(plan), base.task, model_class)
            sample = _sample(model, piece)
            _answer_as(model, piece)
            graph = export(model, sample)
        with progress.stage("tracing: simplifying the graph"):
            _name(graph, piece, model.config)
            graphs[piece.file] = finish(plan, graph, stored_parameters(model), provider)
    return graphs


def _sample(model: Any, piece: Piece) -> Sample:
    """Example inputs with a pad in the mask: a mask of ones only is dropped from a trace."""
    auto = torch.export.Dim.AUTO
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, DynamicAxes] = {}
    known = inspect.signature(getattr(model, piece.method)).parameters
    for name in accepted_inputs(piece.inputs, model.config):
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
    """Make `model.forward` call the piece's method and return the piece's outputs by name."""
    method = getattr(model, piece.method)

    def forward(**kwargs: Any) -> dict[str, Any]:
        outputs = method(**kwargs)
        return {name: outputs[field] for name, field in piece.outputs.items()}

    model.forward = forward


def _name(model: ir.Model, piece: Piece, config: Any) -> None:
    """Name and order inputs and outputs as the piece lists them; drop inputs that nothing reads."""
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
    """Remove `start`, which the exporter puts before a name that inputs and outputs share."""
    for value in values:
        value.name = str(value.name).removeprefix(start)
