"""Gates in a graph: the adapter of each gated site is a side branch, scaled by a function node.

    x -> MatMul A^T -> MatMul B^T -> d \
    x -> the module itself --------> y0 -> ai.adaptrix::Clamp(y0, d, mask) -> y

The module keeps the base's weight. Optional statistics are graph outputs with one number a site, in
the order of `Plan.gated()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Concat, Expression, TensorRef, Transpose
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.gate_functions import FLOOR, call, define
from adaptrix_export.graph.rewrite.taps import (
    Range,
    Tap,
    bound,
    columns_of,
    integers,
    joined,
    low_rank,
    replace_uses,
    taps,
)
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.plan import Array, LowRank, Plan, Site, Tensor, low_ranks

STATISTICS = ("context.gate_mean", "context.gate_min", "context.clamped")
_ROLLED = ("padding.chunk", "padding.forth")  # values of graph/rewrite/padding.py: mask, indices


@dataclass(frozen=True)
class Factor:
    """`scale` * `tensor`, rounded once."""

    tensor: Tensor
    scale: float

    def read(self, dtype: str) -> Array:
        """The values, in a safetensors dtype."""
        return to_dtype(self.scale * self.tensor.read().astype(np.float64), dtype)


@dataclass(frozen=True)
class Wired:
    """`weights`: the graph's expressions, those of the factors among them; `factors`: what these
    expressions name beside the base's tensors; `sites`: number of gates."""

    weights: dict[str, Expression]
    factors: dict[str, Factor]
    sites: int


def factors(plan: Plan) -> dict[str, Factor]:
    """The factors of the gated sites by name, `<module>.lora_A.<number of the term>`.

    The scale is B's: `lora_B.n` is scale * B.
    """
    by_name: dict[str, Factor] = {}
    for site in plan.gated():
        for number, term in enumerate(_terms(plan, site)):
            by_name[f"{site.path}.lora_A.{number}"] = Factor(term.a, 1.0)
            by_name[f"{site.path}.lora_B.{number}"] = Factor(term.b, term.scale)
    return by_name


def _terms(plan: Plan, site: Site) -> list[LowRank]:
    terms = (t for a in plan.adapters for d in a.deltas if d.site == site for t in d.terms)
    return low_ranks(terms)  # `verify` refused all others


def wire_gates(plan: Plan, graph: Graph) -> Wired:
    """Wire a branch and a gate for every gated site, in place; without gates nothing changes.

    `graph` is that of `plan.merged()`, after `wire_left_padding`. Raises UnsupportedError for a
    site that the graph does not have.
    """
    gated, weights = plan.gated(), dict(graph.weights)
    if not gated:
        return Wired(weights, {}, 0)
    model = graph.model
    places = taps(plan.merged(), graph, gated)
    deltas = {site: _branch(plan, model, weights, tap) for site, tap in places.items()}
    put_gates(plan, model, places, deltas)
    return Wired(weights, factors(plan), len(gated))


def put_gates(
    plan: Plan, model: ir.Model, places: Mapping[Site, Tap], deltas: Mapping[Site, ir.Value]
) -> None:
    """Wire a gate for each gated site between its output and its delta, and the statistics.

    `deltas` are the values that are added to the sites' outputs. Raises UnsupportedError for a site
    whose output the graph does not have.
    """
    for site, tap in places.items():
        if not all(piece.biased for piece in tap.pieces):
            raise UnsupportedError(
                f"{site.path} in the graph", "a bias inside another operator", "one of its own",
                "this site cannot be gated with this front end",
            )  # fmt: skip
    masks = _Masks(model)
    gates = _insert(plan, model, places, deltas, masks)
    if plan.gate_stats:
        model.graph.outputs.extend(_statistics(model, gates, masks))
    define(model, {gate.mode for gate in plan.gated().values()})
    model.graph.sort()


def _branch(plan: Plan, model: ir.Model, weights: dict[str, Expression], tap: Tap) -> ir.Value:
    """d = x A^T B^T: the terms' factors stacked, the scales in B."""
    path, terms = tap.site.path, _terms(plan, tap.site)
    rank = sum(term.rank for term in terms)
    down = Concat(0, tuple(TensorRef(f"{path}.lora_A.{n}") for n in range(len(terms))))
    up = Concat(1, tuple(TensorRef(f"{path}.lora_B.{n}") for n in range(len(terms))))
    a = bound(model, weights, f"{path}.lora_A", (tap.inputs, rank), Transpose((1, 0), down))
    b = bound(model, weights, f"{path}.lora_B", (rank, tap.outputs), Transpose((1, 0), up))
    return low_rank(model, tap, a, b, f"{path}.lora")


def _insert(
    plan: Plan,
    model: ir.Model,
    places: Mapping[Site, Tap],
    deltas: Mapping[Site, ir.Value],
    masks: _Masks,
) -> list[ir.Value]:
    """Insert the function nodes and let readers use their outputs; returns each site's gate."""
    packed: dict[int, tuple[ir.Value, int, list[Range]]] = {}
    for tap in places.values():
        for piece in tap.pieces:
            entry = packed.setdefault(id(piece.value), (piece.value, piece.width, []))
            entry[2].append(piece.columns)
    nodes: list[ir.Node] = []
    columns: dict[int, dict[Range, ir.Value]] = {}
    for key, (value, width, ranges) in packed.items():
        columns[key], cut = columns_of(model, value, width, ranges, f"{value.name}.parts")
        nodes += cut
    gates = []
    for site, gate in plan.gated().items():
        tap = places[site]
        y0, join = joined(
            [columns[id(p.value)][p.columns] for p in tap.pieces], f"{site.path}.base_output"
        )
        third = masks.of(tap, gate.mode)
        node = call(gate.mode, [y0, deltas[site], third], site.path, gate.tau, tap.outputs)
        rows, cut = columns_of(
            model, node.outputs[0], tap.outputs, [p.rows for p in tap.pieces], f"{site.path}.rows"
        )
        for piece in tap.pieces:
            columns[id(piece.value)][piece.columns] = rows[piece.rows]
        nodes += [*join, node, *cut]
        gates.append(masks.by_row(node.outputs[1], tap))
    made = {}
    for key, (value, _, _) in packed.items():
        made[key], join = joined(list(columns[key].values()), f"{value.name}.gated")
        nodes += join
    model.graph.extend(nodes)
    for key, (value, _, _) in packed.items():
        replace_uses(model, value, made[key], nodes)
    return gates


class _Masks:
    """Masks over the tokens of this call, float32, in the shapes that the gates read."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[str, ir.Value] = {}
        tokens, last = self._tokens(), self._numbers("last", [-1])
        self.rows = self._add("Unsqueeze", "rows", [tokens, last])

    def _tokens(self) -> ir.Value:
        """(batch, tokens): where the graph rolls its rows, rolled in the same way."""
        inside = {o.name: o for node in self._model.graph for o in node.outputs}
        chunk, forth = (inside.get(name) for name in _ROLLED)
        if chunk is not None and forth is not None:
            chunk = self._add("GatherND", "rolled", [chunk, forth], batch_dims=1)
        else:
            inputs = {value.name: value for value in self._model.graph.inputs}
            length = self._add("Shape", "length", [inputs["input_ids"]], start=1, end=2)
            mask = inputs["attention_mask"]
            start = self._add("Neg", "start", [length])
            end = self._add("Shape", "end", [mask], start=1, end=2)
            chunk = self._add("Slice", "chunk", [mask, start, end, self._numbers("axis", [1])])
        return self._add("Cast", "tokens", [chunk], to=ir.DataType.FLOAT)

    def _add(self, kind: str, name: str, inputs: list[ir.Value], **options: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=options or None, name=f"context.mask.{name}")
        node.outputs[0].name = node.name
        self._model.graph.append(node)
        return node.outputs[0]

    def _numbers(self, name: str, numbers: list[int]) -> ir.Value:
        return integers(self._model, f"context.mask.{name}", numbers)

    def of(self, tap: Tap, mode: str) -> ir.Value:
        """(batch, tokens, 1), or (batch * tokens, 1) where the tap has them in one axis.

        The mask, 1 for a token and 0 for padding; for a clamp its floor.
        """
        name = "floor" if mode == "clamp" else "rows"
        if name not in self._made:
            self._made[name] = self.rows if name == "rows" else self._floor()
        if not tap.flat:
            return self._made[name]
        flat = f"flat_{name}"
        if flat not in self._made:
            shape = self._numbers("flat_shape", [-1, 1])
            self._made[flat] = self._add("Reshape", flat, [self._made[name], shape])
        return self._made[flat]

    def _floor(self) -> ir.Value:
        """FLOOR / 1 for a token, FLOOR / 0 for padding."""
        least = ir.node("Constant", [], {"value_float": FLOOR}, name="context.mask.least")
        least.outputs[0].name = least.name
        self._model.graph.append(least)
        return self._add("Div", "floor", [least.outputs[0], self.rows])

    def by_row(self, gate: ir.Value, tap: Tap) -> ir.Value:
        """A site's gate as (batch, tokens, 1)."""
        if not tap.flat:
            return gate
        if "shape" not in self._made:
            self._made["shape"] = self._add("Shape", "shape", [self.rows])
        return self._add("Reshape", f"{tap.site.path}.gate", [gate, self._made["shape"]])


def _statistics(model: ir.Model, gates: list[ir.Value], masks: _Masks) -> list[ir.Value]:
    """STATISTICS over the unpadded tokens of a call, one number a site each."""

    def add(kind: str, name: str, *inputs: ir.Value, **options: int) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=options or None, name=name)
        node.outputs[0].name = name
        model.graph.append(node)
        return node.outputs[0]

    def number(name: str, value: float) -> ir.Value:
        made = ir.node("Constant", [], attributes={"value_float": value}, name=f"context.{name}")
        made.outputs[0].name = made.name
        model.graph.append(made)
        return made.outputs[0]

    tokens = integers(model, "context.tokens_axes", [0, 1])
    one = number("one", 1.0)
    every = add("Concat", "context.gates", *gates, axis=-1)  # (batch, tokens, sites)
    mask = add("CastLike", "context.mask", masks.rows, every)
    counted = add("ReduceSum", "context.counted", mask, keepdims=0)
    count = add("Max", "context.count", counted, one)
    total = add("ReduceSum", "context.gate_sum", every, tokens, keepdims=0)
    is_token = add("Cast", "context.is_token", mask, to=ir.DataType.BOOL)
    token_gates = add("Where", "context.kept", is_token, every, one)
    closed = add("CastLike", "context.closed", add("Less", "context.less", token_gates, one), every)
    clamped = add("ReduceSum", "context.clamped_sum", closed, tokens, keepdims=0)
    mean, least, share = STATISTICS
    statistics = [
        add("Div", mean, total, count),
        add("ReduceMin", least, token_gates, tokens, keepdims=0),
        add("Div", share, clamped, count),
    ]
    for value in statistics:
        value.shape = ir.Shape([len(gates)])
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return statistics
