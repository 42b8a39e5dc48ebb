"""Make an encoder's attention obey the attention mask.

mobius-onnx hands the mask of the interface, int64 [batch, keys] with ones for tokens, to ONNX
Attention as it is. The operator takes a number to be a bias, and two dimensions to be
(queries, keys): right for one row without padding, silently wrong for a padded batch. ONNX
Runtime's own MultiHeadAttention takes that mask for what it is, computes the same, and is years
older than Attention of opset 23.
"""

from __future__ import annotations

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError

_MASK = 3  # which input of Attention is the mask
_KNOWN = {"q_num_heads", "kv_num_heads", "scale"}  # attributes that have their like
_LOWEST = -3.4028234663852886e38  # float32's: a finite score, so that a row of pads is no NaN


def wire_key_mask(model: ir.Model) -> int:
    """Returns the number of attentions that now have the mask of the interface.

    Raises UnsupportedError for one that MultiHeadAttention cannot say.
    """
    graph = model.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    users = [
        node
        for node, index in list(mask.uses())
        if node.op_type == "Attention" and index == _MASK and not node.domain
    ]
    if not users:
        return 0
    keys = ir.node("Cast", [mask], attributes={"to": ir.DataType.INT32})
    keys.name = keys.outputs[0].name = "attention_mask.keys"
    graph.insert_before(graph[0], keys)
    for node in users:
        _replace(graph, node, keys.outputs[0])
    graph.opset_imports["com.microsoft"] = 1
    return len(users)


def _replace(graph: ir.Graph, node: ir.Node, keys: ir.Value) -> None:
    said = {name: attribute.value for name, attribute in node.attributes.items()}
    more = [v for v in (*node.inputs[_MASK + 1 :], *node.outputs[1:]) if v is not None]
    heads = said.get("q_num_heads")
    if more or heads is None or said.get("kv_num_heads") != heads or not said.keys() <= _KNOWN:
        raise UnsupportedError(
            f"native front end: {node.name}", f"Attention with {said} and {len(more)} more values",
            "as many heads for keys and values as for queries, and a mask alone",
            "build with --frontend traced",
        )  # fmt: skip
    scale = {"scale": said["scale"]} if "scale" in said else {}
    made = ir.node(
        "MultiHeadAttention",
        [*node.inputs[:_MASK], None, keys],
        attributes={"num_heads": heads, "mask_filter_value": _LOWEST, **scale},
        domain="com.microsoft",
        name=node.name,
    )
    old, new = node.outputs[0], made.outputs[0]
    name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
