"""Make an encoder's Attention nodes obey the attention mask.

mobius-onnx hands the mask of the interface, int64 [batch, keys] with ones for tokens, to ONNX
Attention as it is. The operator takes a number to be a bias, and two dimensions to be
(queries, keys): right for one row without padding, silently wrong for a padded batch. It is given
booleans [batch, 1, 1, keys] instead.
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
    axes = ir.Value(
        name="attention_mask.axes",
        shape=ir.Shape([2]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor([1, 2], dtype=ir.DataType.INT64, name="attention_mask.axes"),
    )
    kept = ir.node("Cast", [mask], attributes={"to": ir.DataType.BOOL}, name="attention_mask.bool")
    wide = ir.node("Unsqueeze", [kept.outputs[0], axes], name="attention_mask.keys")
    for node in (kept, wide):
        node.outputs[0].name = node.name
    graph.insert_before(graph[0], [kept, wide])
    graph.initializers[str(axes.name)] = axes
    for node in users:
        node.replace_input_with(_MASK, wide.outputs[0])
    return len(users)
