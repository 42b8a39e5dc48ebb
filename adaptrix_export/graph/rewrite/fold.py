"""Passes that move operators on weights out of the graph and into the weights' expressions."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from adaptrix_export.graph.expression import Concat, Expression, Transpose


def share_equal(model: ir.Model, weights: dict[str, Expression]) -> int:
    """Share one initializer among equal expressions (a tied head); returns how many are dropped."""
    first: dict[Expression, ir.Value] = {}
    dropped = 0
    for name in list(weights):
        value = model.graph.initializers[name]
        shared = first.setdefault(weights[name], value)
        if shared is not value:
            value.replace_all_uses_with(shared)
            del model.graph.initializers[name], weights[name]
            dropped += 1
    return dropped


def fold(model: ir.Model, weights: dict[str, Expression]) -> int:
    """Move Transpose and Concat of weights out of the graph, into the expressions.

    Only where the weight has no other use: a tied embedding is also read untransposed, and ONNX
    Runtime transposes that one itself. Returns the number of nodes folded.
    """
    folded = 0
    for node in list(model.graph):
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type not in _FOLDS or node.domain or not inputs:
            continue
        if any(v.name not in weights or len(list(v.uses())) != 1 for v in inputs):
            continue
        output = node.outputs[0]
        assert output.name is not None
        expressions = [weights.pop(str(v.name)) for v in inputs]
        weights[output.name] = _FOLDS[node.op_type](node, expressions)
        _replace_by_initializer(model, node, output)
        folded += 1
    return folded


_FOLDS: dict[str, Callable[[ir.Node, list[Expression]], Expression]] = {
    "Transpose": lambda node, e: Transpose(tuple(node.attributes["perm"].as_ints()), e[0]),
    "Concat": lambda node, e: Concat(node.attributes["axis"].as_int(), tuple(e)),
}


def _replace_by_initializer(model: ir.Model, node: ir.Node, output: ir.Value) -> None:
    """Take `node` out of the graph; its output becomes an initializer of the same name."""
    graph = model.graph
    sources = [v for v in node.inputs if v is not None]
    dtype, name = sources[0].dtype, output.name
    shape = _folded_shape(node, [v.shape for v in sources if v.shape is not None])
    initializer = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype or ir.DataType.FLOAT))
    output.name = f"{name}.folded"
    output.replace_all_uses_with(initializer)
    graph.remove(node, safe=True)
    for source in sources:
        del graph.initializers[str(source.name)]
    graph.initializers[str(name)] = initializer


def _folded_shape(node: ir.Node, shapes: list[ir.Shape]) -> ir.Shape:
    if node.op_type == "Transpose":
        return ir.Shape([shapes[0][d] for d in node.attributes["perm"].as_ints()])
    axis = node.attributes["axis"].as_int()
    dims = list(shapes[0])
    lengths = [s[axis] for s in shapes]
    dims[axis] = sum(n for n in lengths if isinstance(n, int))  # a weight has no symbolic sizes
    return ir.Shape(dims)
