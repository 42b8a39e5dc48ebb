"""An encoder-decoder as two traced graphs: `encoder_model.onnx` and `decoder_model_merged.onnx`.

The names are those that optimum and transformers.js look for. The decoder takes any number of
tokens after a cache that may be empty, like a language model. The cache of its cross attention is
filled by the first call, the one whose cache is empty (`cross_cache.py`):

    encoder: input_ids, attention_mask (text) or input_features (speech) -> last_hidden_state
    decoder: input_ids, encoder_attention_mask (text), encoder_hidden_states,
             past_key_values.{i}.decoder.key/value, past_key_values.{i}.encoder.key/value
             -> logits, present.{i}.decoder.key/value, present.{i}.encoder.key/value
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SPEECH
from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.graph.frontends.cross_cache import PAST_ENTRY, STATES, wire_cross_cache
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_interface import OUTPUTS, name_interface
from adaptrix_export.graph.frontends.traced_sample import (
    BATCH,
    LENGTH,
    NEW,
    PAST,
    DynamicAxes,
    Sample,
)
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
Make = Callable[[], Any]
_CROSS = "cross_key_values"
_CROSS_ENTRY = re.compile(rf"^(?:input\.)?{_CROSS}\.layers\.(\d+)\.(keys|values)$")


def traced_parts(plan: Plan, provider: str, progress: Progress) -> dict[str, Graph]:
    """File name -> graph, in float32. Raises what `traced` raises."""
    place = f"{plan.base.spec}: model type {plan.base.architecture.model_type!r}"
    task, made = plan.base.task, {}

    def model() -> Any:
        return weightless(live_config(plan), task)

    for file, trace in ((ENCODER, _encoder), (DECODER, _decoder)):
        with (
            traced_faults(place),
            traceable(task == GENERATION),
            progress.stage(f"tracing: {file}"),
        ):
            graph = trace(model, task)
        with progress.stage("tracing: simplifying the graph"):
            made[file] = finish(plan, graph, stored_parameters(model()), provider)
    return made


def _encoder(make: Make, task: str) -> ir.Model:
    """The encoder's graph, its parameters named as in the whole model."""
    model = make()
    part = model.get_encoder()
    start = next(name for name, module in model.named_modules() if module is part) + "."
    graph = export(part, _source(model, task))
    _prefix(graph, start, {name for name, _ in part.named_parameters()})
    name_interface(graph, OUTPUTS[FEATURES])
    return graph


def _source(model: Any, task: str) -> Sample:
    """The encoder's example inputs: text of dynamic sizes, or features of one length."""
    auto = torch.export.Dim.AUTO
    if task == SPEECH:
        config = model.config
        length = 2 * config.max_source_positions  # the encoder halves it
        features = torch.zeros(BATCH, config.num_mel_bins, length)
        return Sample({"input_features": features}, {"input_features": {0: auto}})
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a mask of ones alone is dropped from a trace
    sizes = {0: auto, 1: auto}
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Sample(inputs, dict.fromkeys(inputs, sizes))


def _prefix(model: ir.Model, start: str, parameters: set[str]) -> None:
    """Give initializers that are parameters the name that they have in the whole model."""
    for name in sorted(parameters & set(model.graph.initializers)):
        value = model.graph.initializers.pop(name)
        value.name = start + name
        model.graph.initializers[start + name] = value


def _decoder(make: Make, task: str) -> ir.Model:
    """The decoder's graph: the whole model, called with the encoder's answer."""
    masked = task != SPEECH  # features have one length, and no mask
    graph = export(*_decoding(make(), masked))
    _name_cross(graph.graph)  # first: a graph has one cache that comes out again
    name_interface(graph, OUTPUTS[GENERATION])
    projections = export(*_projecting(make(), masked))
    _name_projections(projections.graph)
    _name_parts(graph.graph)
    wire_cross_cache(graph, projections)
    return graph


def _states(model: Any, masked: bool) -> dict[str, torch.Tensor]:
    states = torch.zeros(BATCH, LENGTH, model.config.hidden_size)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -1] = 0
    return {STATES: states, **({"encoder_attention_mask": mask} if masked else {})}


def _decoding(model: Any, masked: bool) -> tuple[Any, Sample]:
    """New tokens, a self-attention cache, and a cache of the encoder states' keys and values."""
    states = _states(model, masked)
    before = torch.ones(BATCH, PAST, dtype=torch.long)
    with torch.no_grad(), model.fake_mode:
        cache = cache_of(_call_decoder(model, before, states))
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    for layer in (*own.layers, *cross.layers):
        layer.keys, layer.values = torch.zeros(layer.keys.shape), torch.zeros(layer.values.shape)
    model.__class__ = _decoder_class(type(model))
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    inputs: dict[str, Any] = {"input_ids": torch.ones(BATCH, NEW, dtype=torch.long), **states}
    shapes: dict[str, DynamicAxes] = dict.fromkeys(inputs, sizes)
    for name, value in {**cache_argument(own), _CROSS: cross}.items():
        inputs[name] = value
        shapes[name] = [{0: auto, 2: auto}] * (2 * len(value.layers))
    return model, Sample(inputs, shapes)


def _projecting(model: Any, masked: bool) -> tuple[Any, Sample]:
    """The model reduced to the cross-attention keys and values that each layer computes."""
    states = _states(model, masked)
    model.__class__ = _projection_class(type(model))
    auto = torch.export.Dim.AUTO
    return model, Sample(states, {name: {0: auto, 1: auto} for name in states})


def _call_decoder(model: Any, ids: Any, states: Mapping[str, Any], cache: Any = None) -> Any:
    """Run the decoder on encoder states that are computed already."""
    from transformers.modeling_outputs import BaseModelOutput

    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states[STATES]),
        attention_mask=states.get("encoder_attention_mask"),
        decoder_input_ids=ids,
        **cache_argument(cache),
        use_cache=True,
    )


def _decoder_class(kind: type) -> type:
    """A class whose call is the decoder's: states and caches in, logits and own cache out."""
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Decoder(kind):  # type: ignore[misc]
        def forward(
            self,
            input_ids: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            encoder_attention_mask: torch.Tensor | None = None,
            cache: Any = None,
            past_key_values: Any = None,
            cross_key_values: Any = None,
        ) -> Any:
            own = past_key_values if cache is None else cache  # `cache_name` is one of them
            inputs = {
                STATES: encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            }
            both = EncoderDecoderCache(own, cross_key_values)
            output = _call_decoder(super().forward, input_ids, inputs, both)
            return CausalLMOutputWithPast(logits=output.logits, **cache_argument(own))

    return Decoder


def _projection_class(kind: type) -> type:
    """A class whose call returns the cross-attention keys and values of each layer, by name."""

    class Projections(kind):  # type: ignore[misc]
        def forward(
            self,
            encoder_hidden_states: torch.Tensor,
            encoder_attention_mask: torch.Tensor | None = None,
        ) -> Any:
            inputs = {
                STATES: encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
            }
            start = torch.zeros(encoder_hidden_states.shape[0], 1, dtype=torch.long)
            cache = cache_of(_call_decoder(super().forward, start, inputs))
            layers = cache.cross_attention_cache.layers
            return {
                f"present_{i}_encoder_{kind}": value
                for i, layer in enumerate(layers)
                for kind, value in (("key", layer.keys), ("value", layer.values))
            }

    return Projections


def _name_projections(graph: ir.Graph) -> None:
    """The outputs by the name that they have in the decoder's graph."""
    for value in graph.outputs:
        value.name = str(value.name).removeprefix("output.").replace("_", ".")


def _name_cross(graph: ir.Graph) -> None:
    """The inputs that hold the states' keys and values, by layer."""
    for value in graph.inputs:
        match = _CROSS_ENTRY.match(str(value.name))
        if match:
            value.name = f"past_key_values.{match[1]}.encoder.{match[2].removesuffix('s')}"


def _name_parts(graph: ir.Graph) -> None:
    """Name self-attention caches `.decoder.`, order inputs by layer, name the encoder's length."""
    for value in (*graph.inputs, *graph.outputs):
        name = str(value.name)
        if PAST_ENTRY.match(name):
            # not the states' own length: it is zero in the first call, and equal sizes are shared
            _set_axis(value, 2, "past_encoder_sequence_length")
        elif name.startswith(("past_key_values.", "present.")):
            start, _, end = name.rpartition(".")
            value.name = f"{start}.decoder.{end}"
        elif name.startswith("encoder_"):
            _set_axis(value, 1, "encoder_sequence_length")
    graph.inputs[:] = sorted(graph.inputs, key=_place)


def _set_axis(value: ir.Value, axis: int, name: str) -> None:
    assert value.shape is not None
    sizes: list[int | ir.SymbolicDim | str | None] = list(value.shape)
    sizes[0], sizes[axis] = "batch", name
    value.shape = ir.Shape(sizes)


def _place(value: ir.Value) -> tuple[int, str, str]:
    """The sort key of an input: caches last, by layer, self-attention before cross-attention."""
    parts = str(value.name).split(".")
    return (int(parts[1]), parts[2], parts[3]) if len(parts) == 4 else (-1, "", "")
