"""Example inputs for tracing: the smallest call in which all dynamic sizes differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.compat.torch import buffers_of
from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.errors import UnsupportedError

# Different numbers, none of them one: torch.export takes equal sizes for the same size, and a
# size of one for a constant.
BATCH, PAST, NEW, LENGTH = 2, 3, 5, 7


# Axis -> `torch.export.Dim.AUTO` for each dynamic axis; a list for the tensors of a cache.
DynamicAxes = dict[int, Any] | list[dict[int, Any]]


@dataclass(frozen=True)
class Sample:
    """Keyword arguments of the model, and the dynamic axes of each."""

    inputs: Mapping[str, Any]
    shapes: Mapping[str, DynamicAxes]


def sample_of(model: Any, task: str) -> Sample:
    """A call of `model`, whose weights are `weightless`, for a task.

    The mask has a pad in it, on the left: one of ones alone is dropped from a trace.
    """
    return _generating(model) if task == GENERATION else _encoding(model)


def _generating(model: Any) -> Sample:
    """NEW tokens after a cache of PAST tokens."""
    ids = torch.ones(BATCH, NEW, dtype=torch.long)
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.long)
    mask[0, 0] = 0
    _scale_without_memory(model)
    cache = _cache(model)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        if getattr(model.config, "rope_parameters", None):
            _count_positions(model)
        else:
            inputs["position_ids"] = _positions(ids, mask)
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in inputs}
    inputs |= cache_argument(cache)
    shapes |= cache_argument([{0: auto, 2: auto}] * (2 * len(cache.layers)))
    inputs["use_cache"] = True
    return Sample(inputs, shapes)


def embedded_sample(model: Any) -> Sample:
    """As for text generation, with `inputs_embeds` in the place of `input_ids`."""
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.long)
    mask[0, 0] = 0
    _scale_without_memory(model)
    cache = _cache(model)
    width = model.get_input_embeddings().weight.shape[1]
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.zeros(BATCH, NEW, width), "attention_mask": mask
    }  # fmt: skip
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in inputs}
    inputs |= cache_argument(cache)
    shapes |= cache_argument([{0: auto, 2: auto}] * (2 * len(cache.layers)))
    _count_positions(model, "inputs_embeds")
    inputs["use_cache"] = True
    return Sample(inputs, shapes)


def _positions(ids: Any, mask: Any) -> Any:
    """Position ids as transformers computes them: the index of a token among those of its row."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def _count_positions(model: Any, tokens: str = "input_ids") -> None:
    """Let a model with rotary embeddings compute its position ids from the attention mask.

    GroupQueryAttention in the native graph does the same, so both graphs have the same inputs.
    """
    forward = model.forward

    def counting(**kwargs: Any) -> Any:
        places = _positions(kwargs[tokens], kwargs["attention_mask"])
        return forward(position_ids=places, **kwargs)

    model.forward = counting


def _scale_without_memory(model: Any) -> None:
    """Compute dynamically scaled rotary frequencies from the positions of the call only.

    transformers stores the longest sequence so far in Python and branches on it. For one growing
    sequence the frequencies are the same; a longer sequence before it no longer has an effect.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def stateless(rotary: Any) -> Callable[[Any, Any], Any]:
        inner = inspect.unwrap(type(rotary).forward)

        def forward(x: Any, position_ids: Any) -> Any:
            frequencies, scaling = ROPE_INIT_FUNCTIONS["dynamic"](
                rotary.config, x.device, seq_len=position_ids.max() + 1
            )
            now = SimpleNamespace(inv_freq=frequencies, attention_scaling=scaling)
            return inner(now, x, position_ids)

        return forward

    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.forward = stateless(module)


def _cache(model: Any) -> Any:
    """The model's own cache after PAST tokens, filled with zeros; each layer keeps every token.

    A sliding-window cache layer counts tokens in Python, and a trace would make the count a
    constant. It is replaced by a layer that keeps all tokens; the attention mask hides those
    outside the window.
    """
    from transformers import cache_utils

    plain: Any = cache_utils.DynamicLayer  # it is not typed
    ids = torch.ones(BATCH, PAST, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with _untouched(model), torch.no_grad(), model.fake_mode:
        cache = cache_of(model(input_ids=ids, attention_mask=mask, use_cache=True))
    for number, layer in enumerate(getattr(cache, "layers", None) or [None]):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            raise UnsupportedError(
                f"{type(model).__name__}: layer {number}",
                f"a cache of kind {type(layer).__name__}", "keys and values of every token",
                "use --target safetensors",
            )  # fmt: skip
        if layer.is_sliding:
            cache.layers[number] = layer = plain()
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (
            torch.zeros(*made.shape[:2], PAST, made.shape[3]) for made in (keys, values)
        )
    return cache


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Restore attributes and buffers afterwards: longrope would keep the fake frequencies."""
    saved = [(module, dict(vars(module)), dict(buffers_of(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            buffers_of(module).clear()
            buffers_of(module).update(buffers)


def _encoding(model: Any) -> Sample:
    """Whole sequences without a cache; `token_type_ids` where the model has several types."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    known = inspect.signature(model.forward).parameters
    if "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in inputs}
    if "use_cache" in known:
        inputs["use_cache"] = False
    return Sample(inputs, shapes)
