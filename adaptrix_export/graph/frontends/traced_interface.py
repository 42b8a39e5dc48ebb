"""Give a traced graph the interface that every graph here has: names, order, symbolic sizes."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes import common

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQUENCES, TOKENS

# What a graph of each task answers, beside its cache.
OUTPUTS = {
    GENERATION: "logits",
    FEATURES: "last_hidden_state",
    SEQUENCES: "logits",
    TOKENS: "logits",
}
_CACHE = re.compile(r"^(?:input\.|output\.)?past_key_values\.layers\.(\d+)\.(keys|values)$")
_SIZES = {
    "input_ids": ("batch", "sequence_length"),
    "attention_mask": ("batch", "total_sequence_length"),
    "position_ids": ("batch", "sequence_length"),
    "token_type_ids": ("batch", "sequence_length"),
}


def name_interface(model: ir.Model, answer: str) -> None:
    """Rename inputs and outputs, drop the others, and name the symbolic sizes.

    An input that nothing reads is dropped but for `input_ids` and `attention_mask`, which every
    caller feeds.
    """
    graph = model.graph
    cached = False
    for value in graph.inputs:
        found = _CACHE.match(str(value.name))
        if found:
            cached = True
            value.name = f"past_key_values.{found[1]}.{found[2].removesuffix('s')}"
    kept = []
    for value in graph.outputs:
        found = _CACHE.match(str(value.name))
        if found:
            value.name = f"present.{found[1]}.{found[2].removesuffix('s')}"
            kept.append(value)
        elif value.name == answer:
            kept.insert(0, value)
    graph.outputs[:] = kept
    common.RemoveUnusedNodesPass()(model)
    always = ("input_ids", "attention_mask")
    used = [v for v in graph.inputs if v.name in always or v.uses()]
    order = [n for n in _SIZES if any(v.name == n for v in used)]
    graph.inputs[:] = sorted(
        used, key=lambda v: order.index(str(v.name)) if v.name in order else len(order)
    )
    _name_sizes(graph, cached)


def _name_sizes(graph: ir.Graph, cached: bool) -> None:
    """Symbols that tell what a size is; without a cache there is one length alone."""
    for value in graph.inputs:
        named = _SIZES.get(str(value.name), ("batch", None, "past_sequence_length", None))
        if not cached and named[-1] == "total_sequence_length":
            named = ("batch", "sequence_length")
        _name_shape(value, named)
    for value in graph.outputs:
        inner = str(value.name).startswith("present.")
        length = "total_sequence_length" if inner else "sequence_length"
        _name_shape(value, ("batch", None, length, None) if inner else ("batch", length, None))


def _name_shape(value: ir.Value, named: tuple[str | None, ...]) -> None:
    assert value.shape is not None
    value.shape = ir.Shape(
        name if name is not None and not isinstance(size, int) else size
        for size, name in zip(value.shape, named, strict=False)
    )
