"""Locates modules in a graph: the input that a module reads, its output, and which columns of it.

A front end may transpose a weight, pack several into one MatMul or split one. The expressions of
`Graph.weights` say which values of which tensor an initializer contains; the location is computed
from them, not from names in the graph. `low_rank` then adds a side branch `x A^T B^T` there, and
`replace_uses` lets readers use another value.

Weights that anything but a MatMul or a Gemm reads (an embedding, stacked experts) are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import (
    Concat,
    Expression,
    Reshape,
    Slice,
    TensorRef,
    Transpose,
)
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan, Site

Range = tuple[int, int]
_SAME = ("Identity", "Cast")  # on the way from a weight to its reader, beside Transpose


@dataclass(frozen=True)
class Piece:
    """Outputs `rows` of a module are columns `columns` of `value`, which has `width` columns.

    `biased`: `value` includes the module's bias, or there is none. Otherwise another operator adds
    the bias later.
    """

    value: ir.Value
    columns: Range
    width: int
    rows: Range
    biased: bool


@dataclass(frozen=True)
class Tap:
    """A module in the graph: it reads `x` (batch, tokens, inputs); `pieces` make up its `outputs`.

    `flat`: batch and tokens are one axis there, as around a Gemm.
    """

    site: Site
    x: ir.Value
    inputs: int
    outputs: int
    pieces: tuple[Piece, ...]
    flat: bool


@dataclass(frozen=True)
class _Box:
    """A block of a value that is copied from a tensor; every tuple has one entry an axis of the
    value. `axes`: the tensor's axes; `starts`: offsets in the value; `sources`: offsets in the
    tensor; `sizes`: lengths."""

    name: str
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    sources: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Reader:
    """A node that reads an initializer; `turned` if it reads it transposed."""

    node: ir.Node
    index: int
    turned: bool


def taps(plan: Plan, graph: Graph, sites: Iterable[Site]) -> dict[Site, Tap]:
    """The tap of each site's `weight`. Raises UnsupportedError for a site that has none.

    Get the taps of all sites before changing the graph: a tap refers to values of the graph as it
    is.
    """
    readers: dict[str, list[str]] = {}
    for initializer, expression in sorted(graph.weights.items()):
        for name in dict.fromkeys(expression.names()):
            readers.setdefault(name, []).append(initializer)
    return {site: _tap(plan, graph, site, readers) for site in sites}


def _tap(plan: Plan, graph: Graph, site: Site, readers: Mapping[str, list[str]]) -> Tap:
    name = f"{site.path}.weight"
    home = name if name in readers else plan.base.tied.get(name, name)
    shape = _shape(plan, home)
    if len(shape) != 2:
        raise _refused(site, f"a weight of shape {list(shape)}", "two dimensions")
    axis = int(plan.base.architecture.is_transposed(site))  # of the outputs, as it is stored
    node_pieces: list[tuple[ir.Node, Piece]] = []
    for initializer in readers.get(home, ()):
        value = graph.model.graph.initializers[initializer]
        boxes = _boxes(graph.weights[initializer], home, lambda n: _shape(plan, n), site)
        for reader in _readers(value):
            if reader.node.op_type == "Gather" and home != name:
                continue  # the other end of a tie
            for box in _joined([b for b in boxes if b.name == home]):
                piece = _piece(graph, site, reader, box, shape, axis)
                node_pieces.append((reader.node, piece))
    if not node_pieces:
        raise _refused(site, "a weight that no MatMul reads", "one in the graph")
    node_pieces.sort(key=lambda pair: pair[1].rows)
    ends = [0, *(piece.rows[1] for _, piece in node_pieces)]
    if [piece.rows[0] for _, piece in node_pieces] != ends[:-1] or ends[-1] != shape[axis]:
        raise _refused(
            site, f"a weight read by {len(node_pieces)} nodes in parts", "each part once"
        )
    x = node_pieces[0][0].inputs[0]
    assert x is not None
    if any(node.inputs[0] is not x for node, _ in node_pieces):
        raise _refused(site, "parts of a weight that read different inputs", "one input")
    flat = node_pieces[0][0].op_type == "Gemm" or (x.shape is not None and len(x.shape) == 2)
    return Tap(site, x, shape[1 - axis], shape[axis], tuple(p for _, p in node_pieces), flat)


def _refused(site: Site, found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"{site.path} in the graph", found, expected, "it can only be merged; leave it out"
    )


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    change = plan.changes().get(name)
    if change is not None:
        return change.shape
    return plan.base.tensors[plan.base.tied.get(name, name)].shape


def _boxes(
    expression: Expression, source: str, shape_of: Callable[[str], tuple[int, ...]], site: Site
) -> list[_Box]:
    """The blocks of the expression's value that come from tensor `source`."""

    def inside(part: Expression) -> list[_Box]:
        return _boxes(part, source, shape_of, site)

    match expression:
        case TensorRef(name):
            shape = shape_of(name)
            zeros, axes = (0,) * len(shape), tuple(range(len(shape)))
            return [_Box(name, axes, zeros, zeros, shape)] if name == source else []
        case Concat(axis, parts):
            length, boxes = 0, list[_Box]()
            for part in parts:
                boxes += [
                    replace(b, starts=_with(b.starts, axis, length, add=True)) for b in inside(part)
                ]
                length += part.shape(shape_of)[axis]
            return boxes
        case Transpose(order, of):
            return [
                _Box(b.name, *(_permuted(v, order) for v in (b.axes, b.starts, b.sources, b.sizes)))
                for b in inside(of)
            ]
        case Slice(axis, start, stop, of):
            return list(_cut(inside(of), axis, start, stop))
    if not any(map(inside, expression.parts)):
        return []
    if isinstance(expression, Reshape):
        raise _refused(site, "a weight whose values the graph rearranges", "whole columns")
    kind = type(expression).__name__.lower()
    raise _refused(site, f"a weight that the graph computes with ({kind})", "its own values")


def _with(values: tuple[int, ...], axis: int, number: int, add: bool = False) -> tuple[int, ...]:
    new = values[axis] + number if add else number
    return (*values[:axis], new, *values[axis + 1 :])


def _permuted(values: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(values[axis] for axis in order)


def _cut(boxes: list[_Box], axis: int, start: int, stop: int) -> Iterator[_Box]:
    """The parts of the boxes in the range start..stop of an axis, with offsets from `start`."""
    for box in boxes:
        first = max(start, box.starts[axis])
        last = min(stop, box.starts[axis] + box.sizes[axis])
        if first < last:
            yield replace(
                box,
                starts=_with(box.starts, axis, first - start),
                sources=_with(box.sources, axis, first - box.starts[axis], add=True),
                sizes=_with(box.sizes, axis, last - first),
            )


def _joined(boxes: list[_Box]) -> list[_Box]:
    """The boxes, with those merged that are adjacent both in the value and in the tensor.

    GPT-2's c_attn is split into three by the front end and packed again by a fusion.
    """
    joined: list[_Box] = []
    for box in sorted(boxes, key=lambda b: b.starts):
        last = joined[-1] if joined else None
        axis = _continued(last, box) if last is not None else None
        if last is not None and axis is not None:
            size = last.sizes[axis] + box.sizes[axis]
            joined[-1] = replace(last, sizes=_with(last.sizes, axis, size))
        else:
            joined.append(box)
    return joined


def _continued(last: _Box, box: _Box) -> int | None:
    """The axis along which `box` continues `last`, if it does."""
    for axis in range(len(box.axes)):
        ends = (last.starts[axis] + last.sizes[axis], last.sources[axis] + last.sizes[axis])
        others = [
            (_with(b.starts, axis, 0), _with(b.sources, axis, 0), _with(b.sizes, axis, 0), b.axes)
            for b in (last, box)
        ]
        if ends == (box.starts[axis], box.sources[axis]) and others[0] == others[1]:
            return axis
    return None


def _readers(value: ir.Value, turned: bool = False) -> Iterator[_Reader]:
    for node, index in list(value.uses()):
        if node.op_type in _SAME and not node.domain:
            yield from _readers(node.outputs[0], turned)
        elif node.op_type == "Transpose" and not node.domain:
            order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [1, 0]
            yield from _readers(node.outputs[0], turned != (order == [1, 0]))
        else:
            yield _Reader(node, index, turned)


def _piece(
    graph: Graph, site: Site, reader: _Reader, box: _Box, shape: tuple[int, ...], axis: int
) -> Piece:
    """The columns of the reader's output that the box accounts for."""
    node = reader.node
    if node.domain or node.op_type not in ("MatMul", "Gemm") or reader.index != 1:
        raise _refused(site, f"a weight read by {node.domain or 'ai.onnx'}::{node.op_type}",
                       "a MatMul or a Gemm")  # fmt: skip
    turned = reader.turned
    if node.op_type == "Gemm":
        _check_gemm(site, node)
        turned = turned != bool(_number(node, "transB", 0))
    column = 0 if turned else 1  # the initializer's axis that becomes the output's columns
    if box.axes[column] != axis or box.sizes[1 - column] != shape[1 - axis]:
        raise _refused(site, "a weight whose inputs the graph cuts", "whole rows of inputs")
    columns = (box.starts[column], box.starts[column] + box.sizes[column])
    rows = (box.sources[column], box.sources[column] + box.sizes[column])
    value, biased = _output(graph, site, node)
    return Piece(value, columns, _width(graph, reader, column), rows, biased)


def _check_gemm(site: Site, node: ir.Node) -> None:
    if (
        _number(node, "alpha", 1) != 1
        or _number(node, "beta", 1) != 1
        or _number(node, "transA", 0)
    ):
        raise _refused(site, "a Gemm that scales or transposes its input", "a plain one")


def _number(node: ir.Node, name: str, default: float) -> float:
    if name not in node.attributes:
        return default
    value = node.attributes[name].value
    assert isinstance(value, (int, float))
    return value


def _width(graph: Graph, reader: _Reader, column: int) -> int:
    """Number of columns of the reader's output: that of the initializer it reads."""
    weight = reader.node.inputs[1]
    while weight is not None and weight.name not in graph.model.graph.initializers:
        producer = weight.producer()
        weight = producer.inputs[0] if producer is not None else None
    assert weight is not None
    assert weight.shape is not None
    return int(weight.shape.numpy()[column])


def _output(graph: Graph, site: Site, node: ir.Node) -> tuple[ir.Value, bool]:
    """The module's output, and whether its bias is in it."""
    value, bias = node.outputs[0], f"{site.path}.bias"
    reads = {n for n, e in graph.weights.items() if bias in e.names()}
    if not reads or (node.op_type == "Gemm" and _is_read(node, 2, reads)):
        return value, True
    users = list(value.uses())
    if len(users) == 1 and users[0].node.op_type == "Add" and not users[0].node.domain:
        add = users[0].node
        if _is_read(add, 1 - users[0].idx, reads):
            return add.outputs[0], True
    return value, False


def _is_read(node: ir.Node, index: int, initializers: set[str]) -> bool:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is not None and value.name in initializers


def bound(
    model: ir.Model,
    weights: dict[str, Expression],
    name: str,
    shape: tuple[int, ...],
    expression: Expression,
) -> ir.Value:
    """A new float32 initializer, its values given by an expression that joins `weights`."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.initializers[name] = value
    weights[name] = expression
    return value


def low_rank(model: ir.Model, tap: Tap, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
    """Add a side branch `x a b` to the graph; returns its output (batch, tokens, outputs).

    `a` is A transposed (inputs, r), `b` is B transposed (r, outputs) with the scale in it: both
    initializers or inputs of the graph. Make every branch before `replace_uses` is called: an
    output that is replaced may be the input of another module.
    """
    down = _node("MatMul", [tap.x, a], f"{name}.down")
    up = _node("MatMul", [down.outputs[0], b], f"{name}.delta")
    producer = tap.x.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [down, up])
    else:
        model.graph.insert_after(producer, [down, up])
    return up.outputs[0]


def _node(kind: str, inputs: list[ir.Value], name: str) -> ir.Node:
    node = ir.node(kind, inputs, name=name)
    node.outputs[0].name = name
    return node


def columns_of(
    model: ir.Model, value: ir.Value, width: int, ranges: Iterable[Range], name: str
) -> tuple[dict[Range, ir.Value], list[ir.Node]]:
    """Split a packed value at the edges of column ranges, each range a value of its own.

    Returns every part, in order, and the Split node; a single part is the value itself.
    """
    edges = sorted({0, width, *(edge for r in ranges for edge in r)})
    parts = list(pairwise(edges))
    if len(parts) == 1:
        return {parts[0]: value}, []
    sizes = integers(model, f"{name}.columns", [stop - start for start, stop in parts])
    split = ir.node(
        "Split", [value, sizes], attributes={"axis": -1}, num_outputs=len(parts), name=name
    )
    for (start, stop), output in zip(parts, split.outputs, strict=True):
        output.name = f"{name}.{start}-{stop}"
    return dict(zip(parts, split.outputs, strict=True)), [split]


def integers(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    """An int64 vector as an initializer."""
    made = ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(numbers, dtype=ir.DataType.INT64, name=name),
    )
    model.graph.initializers[name] = made
    return made


def joined(parts: list[ir.Value], name: str) -> tuple[ir.Value, list[ir.Node]]:
    """The parts concatenated along the last axis, and the Concat node, if one is needed."""
    if len(parts) == 1:
        return parts[0], []
    join = ir.node("Concat", parts, attributes={"axis": -1}, name=name)
    join.outputs[0].name = name
    return join.outputs[0], [join]


def replace_uses(model: ir.Model, value: ir.Value, made: ir.Value, own: Iterable[ir.Node]) -> None:
    """Let all readers of `value` read `made` instead, except the nodes in `own`, which compute it.

    Sort the graph after the last change: `made` may depend on nodes after `value`.
    """
    keep = set(map(id, own))
    for node, index in list(value.uses()):
        if id(node) not in keep:
            node.replace_input_with(index, made)
    made.shape, made.type = value.shape, value.type
    outputs = model.graph.outputs
    for index, output in enumerate(outputs):
        if output is value:  # a graph output keeps its name
            value.name, made.name = f"{value.name}.base", value.name
            outputs[index] = made
