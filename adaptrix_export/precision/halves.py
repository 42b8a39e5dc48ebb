"""A pass over a graph: matrices are stored in 16 bits and cast where the graph begins.

What is computed stays float32: ONNX Runtime's CPU has few kernels for fp16 and none for bf16, and
computes the casts once, when it loads the graph. Vectors (norms, biases) stay float32, and so do
the constants that front ends draw, rotary tables among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from adaptrix_export.graph.graph import Graph

# Precision -> element type in the graph, and the dtype of the values that are written.
HALVES: Mapping[str, tuple[ir.DataType, str]] = {
    "fp16": (ir.DataType.FLOAT16, "F16"),
    "bf16": (ir.DataType.BFLOAT16, "BF16"),
}


def store_in_half(graph: Graph, precision: str, known: Callable[[str], bool]) -> int:
    """Store the graph's matrices in `precision`, in place; how many there are.

    `known` says of a name in an expression that it is a tensor of the model, not of an adapter.
    """
    kind, _ = HALVES[precision]
    casts = []
    for name, expression in sorted(graph.weights.items()):
        value = graph.model.graph.initializers[name]
        if value.shape is None or len(value.shape) < 2 or not all(map(known, expression.names())):
            continue
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        output = cast.outputs[0]
        output.name, output.shape = f"{name}.float", value.shape
        output.type = ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(output, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        value.type = ir.TensorType(kind)
        casts.append(cast)
    if casts:
        graph.model.graph.insert_before(graph.model.graph[0], casts)
    return len(casts)


def dtype_of(value: ir.Value) -> str:
    """How the values of an initializer are written."""
    return next((dtype for kind, dtype in HALVES.values() if value.dtype == kind), "F32")
