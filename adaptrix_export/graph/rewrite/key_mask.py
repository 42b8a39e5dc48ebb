"""Make an encoder's Attention nodes obey the attention mask.

mobius-onnx hands the mask of the interface, int64 [batch, keys] with ones for tokens, to ONNX
Attention as it is. The operator takes a number to be a bias, and two dimensions to be
(queries, keys): right for one row without padding, silently wrong for a padded batch. It is given
booleans [batch, 1, queries, keys] instead; ONNX Runtime asks for the whole shape.
"""

from __future__ import annotations

import onnx_ir as ir

_MASK = 3  # which input of Attention is the mask


def wire_key_mask(model: ir.Model) -> int:
    """Returns the number of Attention nodes given the boolean mask."""
    graph = model.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    users = [
        node
        for node, index in list(mask.uses())
        if node.op_type == "Attention" and index == _MASK and not node.domain
    ]
    if not users:
        return 0
    constants = [_constant("ones", [1, 1]), _constant("one", [1]), _constant("axes", [1, 2])]
    nodes = _nodes(mask, *constants)
    graph.insert_before(graph[0], nodes)
    graph.initializers.update({str(value.name): value for value in constants})
    for node in users:
        node.replace_input_with(_MASK, nodes[-1].outputs[0])
    return len(users)


def _constant(name: str, numbers: list[int]) -> ir.Value:
    name = f"attention_mask.{name}"
    return ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(numbers, dtype=ir.DataType.INT64, name=name),
    )


def _nodes(mask: ir.Value, ones: ir.Value, one: ir.Value, axes: ir.Value) -> list[ir.Node]:
    """Booleans [batch, 1, 1, keys], then the same for every query: as many as there are keys."""
    kept = ir.node("Cast", [mask], attributes={"to": ir.DataType.BOOL})
    wide = ir.node("Unsqueeze", [kept.outputs[0], axes])
    length = ir.node("Shape", [mask], attributes={"start": 1, "end": 2})
    shape = ir.node("Concat", [ones, length.outputs[0], one], attributes={"axis": 0})
    full = ir.node("Expand", [wide.outputs[0], shape.outputs[0]])
    nodes = [kept, wide, length, shape, full]
    for node in nodes:
        node.name = node.outputs[0].name = f"attention_mask.{node.op_type.lower()}"
    return nodes
