"""An encoder-decoder as two traced graphs: `encoder_model.onnx` and `decoder_model_merged.onnx`.

The names are those that optimum and transformers.js look for. The decoder takes any number of
tokens after a cache that may be empty, like a language model; its cross attention is computed anew
from the encoder's states in each call, so a cache holds the decoder's own tokens alone:

    encoder: input_ids, attention_mask -> last_hidden_state
    decoder: input_ids, encoder_attention_mask, encoder_hidden_states,
             past_key_values.{i}.decoder.key/value -> logits, present.{i}.decoder.key/value
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQ2SEQ
from adaptrix_export.compat.cache_names import cache_argument, cache_of
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.trace_patches import traceable
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_interface import OUTPUTS, name_interface
from adaptrix_export.graph.frontends.traced_sample import BATCH, LENGTH, NEW, PAST, Sample
from adaptrix_export.graph.frontends.weightless import weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"


def traced_parts(plan: Plan, provider: str, progress: Progress) -> dict[str, Graph]:
    """File name -> graph, in float32. Raises what `traced` raises."""
    place = f"{plan.base.spec}: model type {plan.base.architecture.model_type!r}"
    made = {}
    for file, trace in ((ENCODER, _encoder), (DECODER, _decoder)):
        with traced_faults(place), traceable(SEQ2SEQ), progress.stage(f"tracing: {file}"):
            graph, parameters = trace(weightless(live_config(plan), plan.base.task))
        with progress.stage("tracing: simplifying the graph"):
            made[file] = finish(plan, graph, parameters, provider)
    return made


def _encoder(model: Any) -> tuple[ir.Model, set[str]]:
    """The encoder's graph, its parameters named as in the whole model."""
    part = model.get_encoder()
    start = next(name for name, module in model.named_modules() if module is part) + "."
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a mask of ones alone is dropped from a trace
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    graph = export(
        part,
        Sample(
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": sizes, "attention_mask": sizes},
        ),
    )
    _prefix(graph, start, {name for name, _ in part.named_parameters()})
    name_interface(graph, OUTPUTS[FEATURES])
    return graph, {name for name, _ in model.named_parameters()}


def _prefix(model: ir.Model, start: str, parameters: set[str]) -> None:
    """Give initializers that are parameters the name that they have in the whole model."""
    for name in sorted(parameters & set(model.graph.initializers)):
        value = model.graph.initializers.pop(name)
        value.name = start + name
        model.graph.initializers[start + name] = value


def _decoder(model: Any) -> tuple[ir.Model, set[str]]:
    """The decoder's graph: the whole model, called with the encoder's answer."""
    parameters = {name for name, _ in model.named_parameters()}
    model.__class__ = _decoder_class(type(model))
    states = torch.zeros(BATCH, LENGTH, model.config.hidden_size)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -1] = 0
    fed = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    before = torch.ones(BATCH, PAST, dtype=torch.long)
    with torch.no_grad(), model.fake_mode:
        cache = cache_of(model(input_ids=before, **fed))
    for layer in cache.layers:
        layer.keys, layer.values = torch.zeros(layer.keys.shape), torch.zeros(layer.values.shape)
    ids = torch.ones(BATCH, NEW, dtype=torch.long)
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    shapes: dict[str, Any] = dict.fromkeys(("input_ids", *fed), sizes)
    shapes |= cache_argument([{0: auto, 2: auto}] * (2 * len(cache.layers)))
    graph = export(model, Sample({"input_ids": ids, **fed, **cache_argument(cache)}, shapes))
    name_interface(graph, OUTPUTS[GENERATION])
    _name_parts(graph.graph)
    return graph, parameters


def _decoder_class(kind: type) -> type:
    """A class whose call is the decoder's: states and own cache in, logits and own cache out."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

    class Decoder(kind):  # type: ignore[misc]
        def forward(
            self,
            input_ids: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            encoder_attention_mask: torch.Tensor,
            cache: Any = None,
            past_key_values: Any = None,
        ) -> Any:
            own = past_key_values if cache is None else cache  # `cache_name` is one of them
            own = DynamicCache() if own is None else own
            found = super().forward(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids,
                **cache_argument(EncoderDecoderCache(own, DynamicCache())),
                use_cache=True,
            )
            return CausalLMOutputWithPast(logits=found.logits, **cache_argument(own))

    return Decoder


def _name_parts(graph: ir.Graph) -> None:
    """The cache is the decoder's, and the encoder's rows have a length of their own."""
    for value in (*graph.inputs, *graph.outputs):
        name = str(value.name)
        if name.startswith(("past_key_values.", "present.")):
            start, _, end = name.rpartition(".")
            value.name = f"{start}.decoder.{end}"
        elif name.startswith("encoder_") and value.shape is not None:
            value.shape = ir.Shape(["batch", "encoder_sequence_length", *value.shape[2:]])
