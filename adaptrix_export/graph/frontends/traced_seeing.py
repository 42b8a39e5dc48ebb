"""A vision-language model as three traced graphs, as onnxruntime-genai and transformers.js cut it.

    embed_tokens.onnx          input_ids -> inputs_embeds
    vision_encoder.onnx        pixel_values -> image_features (images, tokens, width)
    decoder_model_merged.onnx  inputs_embeds, attention_mask, past_key_values.{i}.key/value
                               -> logits, present.{i}.key/value

A client puts the image features at the positions of the image tokens; the decoder reads them like
the embeddings of text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from adaptrix_export.arch.classes import live_class
from adaptrix_export.arch.inputs import sizes_of
from adaptrix_export.arch.pieces import DECODER, EMBEDDING, PROJECTORS, VISION
from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_interface import OUTPUTS, name_interface
from adaptrix_export.graph.frontends.traced_sample import BATCH, LENGTH, Sample, embedded_sample
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress


class _Reached(Exception):  # no error: it ends a forward pass at the projector
    """Carries the projector's output: what comes after it does not belong to the graph."""


def traced_seeing(plan: Plan, provider: str, progress: Progress) -> dict[str, Graph]:
    """File name -> graph, in float32. Raises what `traced` raises."""
    base = plan.base
    place = f"{base.spec}: model type {base.architecture.model_type!r}"
    model_class = live_class(base.spec, base.config, base.task)
    graphs = {}
    for file, trace in _TRACES.items():
        stage = progress.stage(f"tracing: {file}")
        with traced_faults(place), traceable(generation=True), stage:
            model = weightless(live_config(plan), base.task, model_class)
            graph = trace(model)
        with progress.stage("tracing: simplifying the graph"):
            graphs[file] = finish(plan, graph, stored_parameters(model), provider)
    return graphs


def _embedding(model: Any) -> ir.Model:
    embed = model.get_input_embeddings()
    model.forward = lambda input_ids: {"inputs_embeds": embed(input_ids)}
    auto = torch.export.Dim.AUTO
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    graph = export(model, Sample({"input_ids": ids}, {"input_ids": {0: auto, 1: auto}}))
    _name(graph, ("batch", "sequence_length"), "inputs_embeds")
    return graph


def _vision(model: Any) -> ir.Model:
    projector = model.get_submodule(PROJECTORS[model.config.model_type])

    def stop(module: Any, args: Any, answer: Any) -> None:
        raise _Reached(answer)

    def forward(pixel_values: Any) -> dict[str, Any]:
        watched = projector.register_forward_hook(stop)
        try:
            model.get_image_features(pixel_values=pixel_values)
        except _Reached as reached:
            return {"image_features": reached.args[0]}
        finally:
            watched.remove()
        raise RuntimeError("the projector was not reached")

    model.forward = forward
    auto = torch.export.Dim.AUTO
    sizes = sizes_of("pixel_values", model.config)
    pixels = torch.zeros((BATCH, *(n for n in sizes if isinstance(n, int))))
    graph = export(model, Sample({"pixel_values": pixels}, {"pixel_values": {0: auto}}))
    _name(graph, ("images",), "image_features")
    return graph


def _decoder(model: Any) -> ir.Model:
    graph = export(model, embedded_sample(model))
    name_interface(graph, OUTPUTS[GENERATION])
    return graph


def _name(graph: ir.Model, sizes: tuple[str, ...], output: str) -> None:
    """Set the name of the only output, and the symbolic first sizes of input and output."""
    (answer,) = graph.graph.outputs
    answer.name = output
    for value in (*graph.graph.inputs, answer):
        assert value.shape is not None
        value.shape = ir.Shape([*sizes, *list(value.shape)[len(sizes) :]])


_TRACES: dict[str, Callable[[Any], ir.Model]] = {
    EMBEDDING: _embedding, VISION: _vision, DECODER: _decoder
}  # fmt: skip
