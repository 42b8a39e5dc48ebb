"""Make a graph with GroupQueryAttention right for batches that are padded on the left.

The operator keeps each row's tokens at the start of its cache and counts them with the attention
mask: right if the padding follows the tokens, silently wrong if it comes first, as in generation
with transformers and optimum. Therefore each row is rolled left by the number of its leading pads
in this call, and the hidden states are rolled back before the head. Steps of one token, and rows
without leading pads, are rolled by zero.
"""

from __future__ import annotations

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError

_MASK_READERS = {"ReduceSum", "Shape"}  # independent of where in a row the ones are
_PER_TOKEN = {"MatMul", "Add", "Mul", "Div", "Tanh", "Cast"}


def needs_left_padding(model: ir.Model) -> bool:
    """Whether the graph counts tokens with GroupQueryAttention."""
    return any(node.op_type == "GroupQueryAttention" for node in model.graph)


def wire_left_padding(model: ir.Model) -> int:
    """Roll tokens and positions in, hidden states out; returns the number of values rolled.

    Raises UnsupportedError if a node reads the mask by position: rolling would then be wrong.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    readers = {node.op_type for node, _ in mask.uses()}
    if not readers <= _MASK_READERS:
        raise UnsupportedError(
            "native front end: attention_mask", f"read by {', '.join(sorted(readers))}",
            "counted only", "this graph cannot be made right for left padding",
        )  # fmt: skip
    rolled = [v for name in ("input_ids", "position_ids") if (v := inputs.get(name)) is not None]
    hidden = _last_hidden(model)
    readers_of = {id(v): list(v.uses()) for v in (*rolled, hidden)}

    prelude, postlude = _Nodes(), _Nodes()
    forth, back = _indices(prelude, ids, mask)
    head = readers_of[id(hidden)][0].node
    for made, value, indices in (*((prelude, v, forth) for v in rolled), (postlude, hidden, back)):
        moved = made.roll(value, indices)
        for node, index in readers_of[id(value)]:
            node.replace_input_with(index, moved)
    prelude.insert(graph, before=graph[0])
    postlude.insert(graph, before=head)
    return len(rolled) + 1


def _last_hidden(model: ir.Model) -> ir.Value:
    """The hidden states that the head reads: back from the logits over per-token operators."""
    value = next(v for v in model.graph.outputs if v.name == "logits")
    while True:
        node = value.producer()
        if node is None or node.op_type not in _PER_TOKEN:
            break
        value = next(v for v in node.inputs if v is not None and v.producer() is not None)
        if node.op_type == "MatMul":
            return value
    raise UnsupportedError(
        "native front end: logits", f"made by {node.op_type if node else 'no node'}", "a MatMul",
        "this graph cannot be made right for left padding",
    )  # fmt: skip


class _Nodes:
    """New nodes in order, and the constants that they need."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def constant(self, number: int) -> ir.Value:
        """The int64 vector [number]."""
        name = f"padding.constant.{number}"
        if name not in self.constants:
            array = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
            kind = ir.TensorType(ir.DataType.INT64)
            self.constants[name] = ir.Value(
                name=name, shape=ir.Shape([1]), type=kind, const_value=array
            )
        return self.constants[name]

    def add(self, kind: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes or None, name=f"padding.{name}")
        node.outputs[0].name = f"padding.{name}"
        self.nodes.append(node)
        return node.outputs[0]

    def roll(self, value: ir.Value, indices: ir.Value) -> ir.Value:
        moved = self.add("GatherND", [value, indices], f"{value.name}.rolled", batch_dims=1)
        moved.shape, moved.type = value.shape, value.type
        return moved

    def insert(self, graph: ir.Graph, before: ir.Node) -> None:
        graph.insert_before(before, self.nodes)
        graph.initializers.update(self.constants)


def _indices(made: _Nodes, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Gather indices, int64 [batch, T, 1], that roll left by the leading pads and back again.

    ArgMax of the chunk's mask is the place of the first one, and 0 for a row of pads alone.
    """
    length = made.add("Shape", [ids], "length", start=1, end=2)
    start = made.add("Neg", [length], "start")
    end = made.add("Shape", [mask], "end", start=1, end=2)
    chunk = made.add("Slice", [mask, start, end, made.constant(1)], "chunk")
    # ArgMax of integers is younger than that of floats, and some providers never had it.
    ones = made.add("Cast", [chunk], "ones", to=ir.DataType.FLOAT)
    pads = made.add("ArgMax", [ones], "pads", axis=1, keepdims=1)
    zero, stop, one = (
        made.add("Squeeze", [value], f"{name}.scalar")
        for name, value in (
            ("zero", made.constant(0)),
            ("length", length),
            ("one", made.constant(1)),
        )
    )
    places = made.add("Range", [zero, stop, one], "places")
    indices = []
    for kind, name in (("Add", "forth"), ("Sub", "back")):
        moved = made.add(kind, [places, pads], f"{name}.moved")
        wrapped = made.add("Mod", [moved, length], f"{name}.wrapped")
        indices.append(made.add("Unsqueeze", [wrapped, made.constant(-1)], name))
    return indices[0], indices[1]
