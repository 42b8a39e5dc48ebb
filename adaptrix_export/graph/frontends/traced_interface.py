"""Give a traced graph the interface of all graphs here: names, order, symbolic sizes.

The exporter names inputs and outputs by their path in the model's arguments and outputs, as
`input.past_key_values.layers.0.keys` or, from transformers 5.24 on, `input.cache.layers.0.keys`.
The name of the cache argument is read from the graph; an unknown output is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQUENCES, TOKENS
from adaptrix_export.errors import UnsupportedError

# The output of each task's graph, beside the cache.
OUTPUTS = {
    GENERATION: "logits",
    FEATURES: "last_hidden_state",
    SEQUENCES: "logits",
    TOKENS: "logits",
}
_CACHE = re.compile(r"^(?:input\.|output\.)?(\w+)\.layers\.(\d+)\.(keys|values)$")
# Further outputs of transformers models, by the first part of their names, that clients do not
# read.
_UNREAD = frozenset(
    "attentions aux_loss cross_attentions encoder_attentions encoder_hidden_states "
    "encoder_last_hidden_state hidden_states pooler_output router_logits".split()
)
_SIZES = {
    "input_ids": ("batch", "sequence_length"),
    "attention_mask": ("batch", "total_sequence_length"),
    "position_ids": ("batch", "sequence_length"),
    "token_type_ids": ("batch", "sequence_length"),
    "input_features": ("batch", None, None),
    "inputs_embeds": ("batch", "sequence_length", None),
}


def name_interface(model: ir.Model, answer: str) -> None:
    """Rename inputs and outputs, drop the outputs that no client reads, name the symbolic sizes.

    Inputs that nothing reads are dropped, except `input_ids` and `attention_mask`, which every
    client feeds. Raises UnsupportedError for an unknown output, a missing `answer`, and a cache
    entry that lacks its input or output.
    """
    graph = model.graph
    past = _name_cache(graph.inputs, "past_key_values")
    present = _name_cache(graph.outputs, "present")
    _match_cache(past, present)
    outputs = [value for value in graph.outputs if value.name == answer]
    if len(outputs) != 1:
        named = ", ".join(str(value.name) for value in graph.outputs)
        raise UnsupportedError("traced graph", f"the outputs {named}", f"one named {answer}")
    for value in graph.outputs:
        name = str(value.name)
        if name in present:
            outputs.append(value)
        elif name != answer and name.removeprefix("output.").split(".")[0] not in _UNREAD:
            raise UnsupportedError(
                "traced graph", f"an output named {name}, which is not known",
                f"{answer}, a cache of keys and values, {', '.join(sorted(_UNREAD))}",
                "use --target safetensors, and report this name with the version of transformers",
            )  # fmt: skip
    graph.outputs[:] = outputs
    common.RemoveUnusedNodesPass()(model)
    always = ("input_ids", "attention_mask", "encoder_attention_mask", "encoder_hidden_states")
    used = [v for v in graph.inputs if v.name in always or v.uses()]
    order = [n for n in _SIZES if any(v.name == n for v in used)]
    graph.inputs[:] = sorted(
        used, key=lambda v: order.index(str(v.name)) if v.name in order else len(order)
    )
    _name_sizes(graph, bool(past))


def _name_cache(values: Iterable[ir.Value], word: str) -> dict[str, str]:
    """Rename cache entries to `word.{layer}.key` and `.value`; returns new name -> old name."""
    named: dict[str, str] = {}
    for value in values:
        match = _CACHE.match(str(value.name))
        if not match:
            continue
        name = f"{word}.{match[2]}.{match[3].removesuffix('s')}"
        if name in named:
            raise UnsupportedError(
                "traced graph", f"two caches, {named[name]} and {value.name}",
                "one of keys and values", "use --target safetensors",
            )  # fmt: skip
        named[name] = str(value.name)
        value.name = name
    return named


def _match_cache(past: dict[str, str], present: dict[str, str]) -> None:
    """Refuse a cache entry that is an input only, or an output only."""
    ins = {name.removeprefix("past_key_values") for name in past}
    outs = {name.removeprefix("present") for name in present}
    if ins != outs:
        lone = ", ".join(
            [past[f"past_key_values{n}"] for n in sorted(ins - outs)]
            + [present[f"present{n}"] for n in sorted(outs - ins)]
        )
        raise UnsupportedError(
            "traced graph", f"one side alone of a cache: {lone}",
            "an output for each input of the cache, and the other way round",
            "use --target safetensors",
        )  # fmt: skip


def _name_sizes(graph: ir.Graph, cached: bool) -> None:
    """Set symbolic sizes; without a cache `sequence_length` is the only length."""
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
