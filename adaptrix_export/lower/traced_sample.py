"""What a model is traced on: the smallest call that shows every way in which sizes can vary."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.task import GENERATION

# Different numbers, none of them one: torch.export takes equal sizes for the same size, and a
# size of one for a constant.
BATCH, PAST, NEW, LENGTH = 2, 3, 5, 7


@dataclass(frozen=True)
class Sample:
    """Keyword arguments of the model, and for each of them the sizes that vary."""

    inputs: Mapping[str, Any]
    shapes: Mapping[str, Any]


def sample_of(model: Any, task: str) -> Sample:
    """A call of `model`, whose weights are `weightless`, for a task.

    The mask has a pad in it, on the left: one of ones alone is dropped from a trace.
    """
    return _generating(model) if task == GENERATION else _encoding(model)


def _generating(model: Any) -> Sample:
    """Several tokens after a cache of several others."""
    ids = torch.ones(BATCH, NEW, dtype=torch.long)
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.long)
    mask[0, 0] = 0
    cache = _cache(model)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        if getattr(model.config, "rope_parameters", None):
            _count_positions(model)
        else:
            inputs["position_ids"] = _positions(ids, mask)
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in inputs}
    inputs["past_key_values"] = cache
    shapes["past_key_values"] = [{0: auto, 2: auto}] * (2 * len(cache.layers))
    inputs["use_cache"] = True
    return Sample(inputs, shapes)


def _positions(ids: Any, mask: Any) -> Any:
    """The place of each token of `ids` among the real tokens of its row, as transformers counts."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def _count_positions(model: Any) -> None:
    """Let a model with rotary embeddings find the positions in the mask by itself.

    So does GroupQueryAttention in the native graph: both then have the same inputs.
    """
    forward = model.forward

    def counting(**given: Any) -> Any:
        places = _positions(given["input_ids"], given["attention_mask"])
        return forward(position_ids=places, **given)

    model.forward = counting


def _cache(model: Any) -> Any:
    """A cache of PAST tokens, as the model itself makes it, of zeros."""
    ids = torch.ones(BATCH, PAST, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad(), model.fake_mode:
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    for number, layer in enumerate(getattr(cache, "layers", None) or [None]):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            raise UnsupportedError(
                f"{type(model).__name__}: layer {number}",
                f"a cache of kind {type(layer).__name__}", "keys and values of every token",
                "use --target safetensors",
            )  # fmt: skip
        layer.keys, layer.values = torch.zeros(keys.shape), torch.zeros(values.shape)
    return cache


def _encoding(model: Any) -> Sample:
    """Whole rows; token types where the model has more than one."""
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
