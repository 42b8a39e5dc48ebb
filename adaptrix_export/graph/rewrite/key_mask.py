"""Make an encoder's attention obey the attention mask.

mobius-onnx passes the attention mask, int64 [batch, keys] with ones for tokens, to ONNX Attention
unchanged. The operator reads numbers as a bias and two dimensions as (queries, keys): right for one
row without padding, silently wrong for a padded batch. ONNX Runtime's MultiHeadAttention accepts
such a key mask, computes the same, and is years older than Attention of opset 23.
"""

from __future__ import annotations

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError

_MASK = 3  # which input of Attention is the mask
_KNOWN = {"q_num_heads", "kv_num_heads", "scale"}  # attributes that MultiHeadAttention has, too
_LOWEST = -3.4028234663852886e38  # float32's: a finite score, so that a row of pads is no NaN


def wire_key_mask(model: ir.Model) -> int:
    """Replace Attention nodes that read the mask by MultiHeadAttention; returns their number.

    Raises UnsupportedError for a node that MultiHeadAttention cannot express.
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
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    more = [v for v in (*node.inputs[_MASK + 1 :], *node.outputs[1:]) if v is not None]
    heads = attributes.get("q_num_heads")
    if (
        more
        or heads is None
        or attributes.get("kv_num_heads") != heads
        or not attributes.keys() <= _KNOWN
    ):
        raise UnsupportedError(
            f"native front end: {node.name}",
            f"Attention with {attributes} and {len(more)} more values",
            "as many heads for keys and values as for queries, and a mask alone",
            "build with --frontend traced",
        )  # fmt: skip
    scale = {"scale": attributes["scale"]} if "scale" in attributes else {}
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
