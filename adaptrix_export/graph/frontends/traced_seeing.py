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
from adaptrix_export.arch.inputs import IMAGES, random_inputs, sizes_of
from adaptrix_export.arch.pieces import DECODER, EMBEDDING, SEEN, VISION
from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.compat.torch import counted_buckets
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.graph.frontends.image_features import image_features
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.traced import export, finish, traced_faults
from adaptrix_export.graph.frontends.traced_interface import OUTPUTS, name_interface
from adaptrix_export.graph.frontends.traced_sample import BATCH, LENGTH, Sample, embedded_sample
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress


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
    """Where a row has several images, a part of one is padding and so is a whole one: what is ones
    alone is dropped from a trace."""
    model.forward = lambda **pixels: {"image_features": image_features(model, pixels)}
    auto = torch.export.Dim.AUTO
    names, config = SEEN[model.config.model_type], model.config
    sizes = {name: sizes_of(name, config, type(model).__name__) for name in names}
    inputs = {
        n: torch.from_numpy(v) for n, v in random_inputs(names, config, BATCH + 1, seed=0).items()
    }
    shapes = {
        name: dict.fromkeys([0, *(i for i, n in enumerate(own, 1) if isinstance(n, str))], auto)
        for name, own in sizes.items()
    }
    with counted_buckets():
        graph = export(model, Sample(inputs, shapes))
    _name(graph, (), "image_features")
    several = any(isinstance(n, str) for own in sizes.values() for n in own)
    for value in graph.graph.inputs:
        value.name = str(value.name).removeprefix("input.")
        value.shape = ir.Shape(["batch" if several else IMAGES, *sizes[value.name]])
    (answer,) = graph.graph.outputs
    assert answer.shape is not None
    answer.shape = ir.Shape(["real_images" if several else IMAGES, *list(answer.shape)[1:]])
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
