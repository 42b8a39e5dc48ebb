"""One vector a row beside the hidden states: the output `sentence_embedding` of a features graph.

`mean` is the mean over the tokens that the mask keeps, as sentence-transformers' Pooling takes it
(a row of pads alone gives zeros); `cls` is the first position.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError

OUTPUT = "sentence_embedding"
SMALLEST = 1e-9  # what sentence-transformers divides by where there is no token
POOLINGS = ("mean", "cls")


def wire_pooling(model: ir.Model, kind: str) -> int:
    """Append the output and return the number of nodes that make it.

    Raises UnsupportedError for a graph without hidden states.
    """
    graph = model.graph
    hidden = next((v for v in graph.outputs if v.name == "last_hidden_state"), None)
    if hidden is None:
        raise UnsupportedError(
            f"pooling {kind}", "a graph without last_hidden_state", "a feature-extraction graph",
            "leave pooling out",
        )  # fmt: skip
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    nodes = _mean(graph, hidden, mask) if kind == "mean" else _first(graph, hidden)
    for number, node in enumerate(nodes):
        node.name = f"pooling.{number}.{node.op_type.lower()}"
        node.outputs[0].name = node.name
    graph.extend(nodes)
    pooled = nodes[-1].outputs[0]
    pooled.name = OUTPUT
    pooled.type = ir.TensorType(ir.DataType.FLOAT)
    sizes = hidden.shape if hidden.shape is not None else ("batch", None, None)
    pooled.shape = ir.Shape([sizes[0], sizes[2]])
    graph.outputs.append(pooled)
    return len(nodes)


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    made = ir.tensor(value, name=f"pooling.{name}")
    held = ir.Value(
        name=made.name, shape=ir.Shape(value.shape), type=ir.TensorType(made.dtype),
        const_value=made,
    )  # fmt: skip
    graph.initializers[str(made.name)] = held
    return held


def _first(graph: ir.Graph, hidden: ir.Value) -> list[ir.Node]:
    start = _constant(graph, "first", np.array(0, np.int64))
    return [ir.node("Gather", [hidden, start], attributes={"axis": 1})]


def _mean(graph: ir.Graph, hidden: ir.Value, mask: ir.Value) -> list[ir.Node]:
    last = _constant(graph, "last_axis", np.array([-1], np.int64))
    tokens = _constant(graph, "token_axis", np.array([1], np.int64))
    smallest = _constant(graph, "smallest", np.array(SMALLEST, np.float32))
    kept = ir.node("Cast", [mask], attributes={"to": ir.DataType.FLOAT})
    wide = ir.node("Unsqueeze", [kept.outputs[0], last])
    masked = ir.node("Mul", [hidden, wide.outputs[0]])
    total = ir.node("ReduceSum", [masked.outputs[0], tokens], attributes={"keepdims": 0})
    count = ir.node("ReduceSum", [wide.outputs[0], tokens], attributes={"keepdims": 0})
    some = ir.node("Max", [count.outputs[0], smallest])
    mean = ir.node("Div", [total.outputs[0], some.outputs[0]])
    return [kept, wide, masked, total, count, some, mean]
