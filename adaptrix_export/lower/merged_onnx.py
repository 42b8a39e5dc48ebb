"""Target `onnx`: one graph with the adapters merged in, weights in one file beside it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from adaptrix_export.load.task import FEATURES
from adaptrix_export.load.tensors import DTYPES
from adaptrix_export.lower.artifact import Artifact
from adaptrix_export.lower.key_mask import wire_key_mask
from adaptrix_export.lower.merge import merged, plain_blocks
from adaptrix_export.lower.onnx_graph import Graph, native
from adaptrix_export.lower.padding import needs_left_padding, wire_left_padding
from adaptrix_export.lower.weights import Expression, evaluate
from adaptrix_export.lower.writer import HashingWriter
from adaptrix_export.plan import Array, Change, Plan
from adaptrix_export.progress import Progress

MODEL = "model.onnx"
DATA = "model.onnx.data"
ALIGNMENT = 4096  # a page: ONNX Runtime can then map each initializer
INLINE = 1024  # bytes; smaller constants stay inside the graph file


def lower_merged_onnx(
    plan: Plan, stage: Path, progress: Progress, provider: str = "cpu"
) -> Artifact:
    """Write the merged graph and its weights, float32, into `stage`."""
    with progress.stage("graph"):
        graph = native(plan, provider)
        if needs_left_padding(graph.model):
            wire_left_padding(graph.model)
        if plan.base.task == FEATURES:
            wire_key_mask(graph.model)
    weights = dict(sorted(graph.weights.items()))
    hashes = {DATA: _write_data(plan, graph.model, weights, stage / DATA, progress)}
    graph.model.graph.name = plan.base.architecture.model_type
    with HashingWriter(stage / MODEL) as out:
        out.write(ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True))
        hashes[MODEL] = out.hexdigest
    _note_unused(graph, progress)
    return Artifact(
        folder=stage,
        target="onnx",
        precision="fp32",
        hashes=hashes,
        weights=weights,
        untied=plan.untied(),
        config_changes=plan.config_changes(),
        frontend=graph.frontend,
    )


def _note_unused(graph: Graph, progress: Progress) -> None:
    if graph.unused:
        progress.note(
            f"{len(graph.unused)} base tensors are not read: {', '.join(graph.unused[:5])}"
        )


def _write_data(
    plan: Plan, model: ir.Model, weights: dict[str, Expression], path: Path, progress: Progress
) -> str:
    """Evaluate each initializer, write it, and point the graph at its bytes; returns the sha256."""
    values = model.graph.initializers
    large = [
        n for n, v in values.items() if v.const_value is not None and v.const_value.nbytes > INLINE
    ]
    total = 4 * sum(_size(values[name]) for name in weights)
    changes = plan.changes()
    with HashingWriter(path) as out, progress.stage("weights", total, "B") as advance:
        for name in (*weights, *sorted(large)):
            constant = values[name].const_value
            array = _values(plan, changes, weights[name]) if constant is None else constant.numpy()
            out.align(ALIGNMENT)
            offset = out.position
            size = out.write_array(array)
            values[name].const_value = ir.ExternalTensor(
                location=DATA, offset=offset, length=size, name=name,
                dtype=ir.DataType.FLOAT if constant is None else constant.dtype,
                shape=ir.Shape(array.shape), base_dir=path.parent,
            )  # fmt: skip
            if constant is None:
                advance(size)
        return out.hexdigest


def _size(value: ir.Value) -> int:
    sizes: tuple[int, ...] = value.shape.numpy() if value.shape is not None else ()
    return prod(sizes)


def _values(plan: Plan, changes: dict[str, Change], expression: Expression) -> Array:
    """One initializer in float32: moves of values that were rounded once.

    An expression that computes (a factor, a shift) is evaluated in float64, so that it is still
    one rounding.
    """
    dtype = "F64" if "affine" in repr(expression) else "F32"

    def read(name: str) -> Array:
        if name in changes:
            return merged(changes[name], dtype)
        stored = plan.base.tensors[plan.base.tied.get(name, name)]
        return np.concatenate(list(plain_blocks(stored, dtype)))

    def rows(name: str, start: int, stop: int) -> Array:
        if name in changes:
            return merged(changes[name], dtype, start, stop)
        stored = plan.base.tensors[plan.base.tied.get(name, name)]
        return stored.rows(start, stop).astype(DTYPES[dtype])

    return evaluate(expression, read, rows).astype(np.float32, copy=False)
