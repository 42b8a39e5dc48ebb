"""Adapts a graph to what clients expect of its names; no value changes.

- The names of symbolic sizes: transformers.js fills an empty cache by the name `batch_size`.
- Unused optional outputs have no name: both float16 converters (onnxconverter-common,
  onnxruntime.transformers) convert every named output of Skip(Simplified)LayerNormalization, and
  then write a graph that does not load.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

SIZES = {
    "batch": "batch_size",
    "sequence_len": "sequence_length",
    "seq_len": "sequence_length",
    "past_sequence_len": "past_sequence_length",
    "past_seq_len": "past_sequence_length",
    "past_seq_len + seq_len": "total_sequence_length",
    "past_sequence_len + sequence_len": "total_sequence_length",
}
# The first output is the sum's norm; the others are optional, and the last one is the plain sum.
WITH_OPTIONAL_OUTPUTS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def make_portable(model: ir.Model) -> tuple[int, int]:
    """Rename sizes and drop the names of unused optional outputs, in place; how many of each."""
    return _rename_sizes(model.graph), _omit_outputs(model.graph)


def _rename_sizes(graph: ir.Graph) -> int:
    count = 0
    for value in _values(graph):
        if value.shape is None:
            continue
        named = [
            SIZES.get(str(d.value), d.value) if isinstance(d, ir.SymbolicDim) else d
            for d in value.shape
        ]
        shape = ir.Shape(named)
        if shape != value.shape:
            value.shape = shape
            count += 1
    return count


def _omit_outputs(graph: ir.Graph) -> int:
    count = 0
    for node in graph:
        if node.op_type not in WITH_OPTIONAL_OUTPUTS:
            continue
        for output in node.outputs[1:]:
            if output.name and not output.uses() and not output.is_graph_output():
                output.name = ""
                count += 1
    return count


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Graph inputs and outputs of nodes, each once."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
