"""Target `onnx`: one graph with the adapters merged in, weights in one file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.arch.tasks import TWO_PARTS
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.graph.frontends.draw import AUTO, Trial, draw, draw_parts
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.facts import state_facts
from adaptrix_export.graph.rewrite.gates import Factor, wire_gates
from adaptrix_export.graph.rewrite.opset import lower_opset
from adaptrix_export.graph.rewrite.pooling import wire_pooling
from adaptrix_export.graph.rewrite.portable import make_portable
from adaptrix_export.graph.rewrite.virtual_tokens import prompt_tensors, wire_prompt
from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.merge.merge import merged, plain_blocks
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.passes.quantize.quantizing import quantizing
from adaptrix_export.plan import Array, Base, Plan, Tensor
from adaptrix_export.precision.halves import HALVES, dtype_of, store_in_half
from adaptrix_export.precision.nbits import place_views
from adaptrix_export.precision.settings import Quantization
from adaptrix_export.progress import Progress
from adaptrix_export.save.writer import HashingWriter
from adaptrix_export.targets.artifact import Artifact

MODEL = "model.onnx"
DATA = "model.onnx.data"
ALIGNMENT = 4096  # a page: ONNX Runtime can then map each initializer
INLINE = 1024  # bytes; smaller constants stay inside the graph file


def lower_merged_onnx(
    plan: Plan,
    stage: Path,
    progress: Progress,
    frontend: str = AUTO,
    provider: str = "cpu",
    trial: Trial | None = None,
    quantization: Quantization | None = None,
    precision: str = "fp32",
) -> Artifact:
    """Write the merged graph or graphs and their weights into `stage`: floats of `precision`, or
    quantized."""
    merged_plan = plan.merged()  # gated sites keep the base's weights
    if plan.prompt is not None:
        frontend = _for_prompt(
            plan, frontend, quantization.precision if quantization else precision
        )
    graphs = _graphs(merged_plan, provider, frontend, progress, trial)
    factors: Mapping[str, Factor] = {}
    if MODEL in graphs and plan.base.skeleton is None:
        wired = wire_gates(plan, graphs[MODEL])
        graphs[MODEL] = replace(graphs[MODEL], weights=wired.weights)
        factors = wired.factors
        graphs[MODEL] = wire_prompt(plan, graphs[MODEL])
        if plan.pooling is not None:
            wire_pooling(graphs[MODEL].model, plan.pooling)
    elif plan.gated():
        raise UnsupportedError(
            f"{plan.base.spec}: task {plan.base.task}", "context", "one graph to gate",
            "leave context out, or use mode blend",
        )  # fmt: skip
    values = Values(merged_plan, factors, prompt_tensors(plan))
    with quantizing(quantization, graphs, merged_plan, values, progress) as quantized:
        graphs = dict(quantized.graphs)
        store_floats(graphs, merged_plan, precision)
        hashes = {DATA: write_data(values, graphs, stage / DATA, progress)}
        for file, graph in graphs.items():
            state_facts(graph.model)
            hashes[file] = write_model(graph.model, plan.base, stage / file)
    note_unused(tuple(graphs.values()), progress)
    first = next(iter(graphs.values()))
    return Artifact(
        folder=stage,
        target="onnx",
        precision=quantization.precision if quantization else precision,
        hashes=hashes,
        weights=dict(sorted(w for graph in graphs.values() for w in graph.weights.items())),
        quantized=quantized.entries,
        kept_float=quantized.kept_float,
        untied=plan.untied(),
        config_changes=config_changes(plan),
        frontend=first.frontend,
        frontend_reason=first.reason,
        gates=plan.gates,
        gate_stats=plan.gate_stats,
    )


def store_floats(graphs: Mapping[str, Graph], plan: Plan, precision: str) -> None:
    """Make the graphs hold their matrices in 16 bits, if that is the precision."""
    if precision in HALVES:
        tensors = {*plan.base.tensors, *plan.base.tied, *plan.changes()}
        for graph in graphs.values():
            store_in_half(graph, precision, tensors.__contains__)


def _for_prompt(plan: Plan, frontend: str, precision: str) -> str:
    """The front end whose graph takes a mask with a prompt before the pads."""
    gates = "gates" if plan.gates else ""
    if gates or frontend not in (AUTO, "traced") or precision != "fp32":
        raise UnsupportedError(
            f"{plan.base.spec}: a learned prompt",
            gates or f"front end {frontend}, precision {precision}",
            "a traced graph in fp32", "leave front end, precision and context to their defaults",
        )  # fmt: skip
    return "traced"


def write_model(model: ir.Model, base: Base, path: Path) -> str:
    """Write the graph, after `write_data`; returns the sha256."""
    model.graph.name = base.architecture.model_type
    lower_opset(model)
    make_portable(model)
    with HashingWriter(path) as out:
        out.write(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
        return out.hexdigest


def _graphs(
    plan: Plan, provider: str, frontend: str, progress: Progress, trial: Trial | None
) -> dict[str, Graph]:
    """File name -> graph. An initializer of a name means the same in all of them."""
    if plan.base.task not in TWO_PARTS and plan.base.skeleton is None:
        return {MODEL: draw(plan, provider, frontend, progress, trial)}
    graphs = draw_parts(plan, provider, frontend, progress, trial)
    _part_constants(graphs)
    known: dict[str, Expression] = {}
    for file, graph in graphs.items():
        weights = {}
        for name, expression in graph.weights.items():
            own = name
            if known.setdefault(name, expression) != expression:
                own = f"{file.removesuffix('.onnx')}.{name}"
                value = graph.model.graph.initializers.pop(name)
                value.name = own
                graph.model.graph.initializers[own] = value
            weights[own] = expression
        graphs[file] = replace(graph, weights=weights)
    return graphs


def _part_constants(graphs: Mapping[str, Graph]) -> None:
    """Give a constant of one graph a name that no other graph has for something else."""
    for file, graph in graphs.items():
        others = [g.model.graph.initializers for f, g in graphs.items() if f != file]
        own = graph.model.graph.initializers
        for name in [n for n in own if n not in graph.weights and any(n in o for o in others)]:
            value = own.pop(name)
            value.name = f"{file.removesuffix('.onnx')}.{name}"
            own[value.name] = value


def note_unused(graphs: tuple[Graph, ...], progress: Progress) -> None:
    unused = [name for name in graphs[0].unused if all(name in g.unused for g in graphs)]
    if unused:
        progress.note(f"{len(unused)} base tensors are not read: {', '.join(unused[:5])}")


def write_data(
    values_of: Values, graphs: Mapping[str, Graph], path: Path, progress: Progress
) -> str:
    """Evaluate each initializer, write it once, and point the graphs at its bytes; returns the
    sha256. Equal expressions share their bytes, and so does a constant of several graphs."""
    uses = {(name, file): graph for file, graph in graphs.items() for name in graph.weights}
    sizes = {g.weights[n]: _size(g.model.graph.initializers[n]) for (n, _), g in uses.items()}
    placed: dict[tuple[Expression, str], tuple[int, int, tuple[int, ...]]] = {}
    with (
        HashingWriter(path) as out,
        progress.stage("weights", 4 * sum(sizes.values()), "B") as advance,
    ):

        def write(array: Array) -> tuple[int, int, tuple[int, ...]]:
            out.align(ALIGNMENT)
            return out.position, out.write_array(array), array.shape

        for (name, _), graph in sorted(uses.items(), key=lambda item: item[0]):
            value = graph.model.graph.initializers[name]
            key = (graph.weights[name], dtype_of(value))
            if key not in placed:
                placed[key] = write(values_of(*key))
                advance(placed[key][1])
            assert value.dtype is not None
            value.const_value = _external(name, value.dtype, placed[key], path)
        constants: dict[int, tuple[object, tuple[int, int, tuple[int, ...]]]] = {}
        for graph in graphs.values():
            for name, value in sorted(graph.model.graph.initializers.items()):
                constant = value.const_value
                if isinstance(constant, ir.ExternalTensor) or constant is None:
                    continue
                if constant.nbytes > INLINE:
                    if id(constant) not in constants:  # a copy of a graph shares its constants
                        constants[id(constant)] = (constant, write(constant.numpy()))
                    _, placed_at = constants[id(constant)]
                    value.const_value = _external(name, constant.dtype, placed_at, path)
            place_views(graph.model)
        return out.hexdigest


def _external(
    name: str, dtype: ir.DataType, placed: tuple[int, int, tuple[int, ...]], path: Path
) -> ir.ExternalTensor:
    offset, length, shape = placed
    return ir.ExternalTensor(
        location=DATA, offset=offset, length=length, name=name, dtype=dtype,
        shape=ir.Shape(shape), base_dir=path.parent,
    )  # fmt: skip


def _size(value: ir.Value) -> int:
    sizes: tuple[int, ...] = value.shape.numpy() if value.shape is not None else ()
    return prod(sizes)


@dataclass(frozen=True)
class Values:
    """Initializers in float32 or 16 bits: moves of values that were rounded once.

    `factors` and `beside` are what expressions name beside the tensors of the plan.
    """

    plan: Plan
    factors: Mapping[str, Factor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, expression: Expression, stored: str = "F32") -> Array:
        """Values in the dtype `stored`. An expression that computes (a factor, a shift) is
        evaluated in float64, so that it is still one rounding."""
        dtype = "F64" if expression.computes else stored

        def read(name: str) -> Array:
            if name in self.factors:
                return self.factors[name].read(dtype)
            change = self.plan.changes().get(name)
            if change is not None:
                return merged(change, dtype)
            blocks = list(plain_blocks(self._stored(name), dtype))
            return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)  # a scalar has one

        def rows(name: str, start: int, stop: int) -> Array:
            change = self.plan.changes().get(name)
            if change is not None:
                return merged(change, dtype, start, stop)
            return self._stored(name).rows(start, stop).astype(DTYPES[dtype])

        values = expression.evaluate(read, rows)
        if values.dtype != DTYPES[stored]:
            values = to_dtype(values, stored)
        if stored == "F16" and not np.isfinite(values).all():
            raise UnsupportedError(
                next(expression.names()), "values beyond the range of fp16", "at most 65504",
                "use precision bf16 or fp32",
            )  # fmt: skip
        return values

    def _stored(self, name: str) -> Tensor:
        if name in self.beside:
            return self.beside[name]
        return self.plan.base.tensors[self.plan.base.tied.get(name, name)]
