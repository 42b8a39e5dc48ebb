"""Lengths at which a model computes otherwise: windows, chunks, and rotary embeddings that switch.

A prompt shorter than the threshold proves nothing of what lies beyond it, so each threshold of a
config is crossed: by a prefill, by a prefill in chunks, while decoding, and in padded batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

# Key of config.json -> what the threshold is called, and the kind in `layer_types` that has it.
_WINDOWS = {
    "sliding_window": ("sliding window", "sliding_attention"),
    "attention_chunk_size": ("chunked attention", "chunked_attention"),
    "window_size": ("local attention", None),  # of GPT-Neo
}
_ORIGINAL, _POSITIONS = "original_max_position_embeddings", "max_position_embeddings"
_SWITCHING = ("longrope", "dynamic", "su")  # types of rotary scaling that depend on the length
AROUND = 8  # tokens before and after the threshold that are decoded one by one


@dataclass(frozen=True)
class Threshold:
    """`at` tokens are computed in one way, more in another.

    `switching`: the longest row of a batch decides for all of it, and for every token fed with it,
    so that a prefill in chunks is not the prefill at once; PyTorch is asked in the same steps.
    """

    kind: str
    at: int
    switching: bool = False

    def __str__(self) -> str:
        return f"{self.kind} of {self.at}"


def thresholds(config: Mapping[str, Any]) -> tuple[Threshold, ...]:
    """The thresholds of a config.json, the smallest first; those of the text model where nested."""
    inner = config.get("text_config")
    place = inner if isinstance(inner, Mapping) else config
    either = {*_windows(place), *_rotary(place)}
    return tuple(sorted(either, key=lambda threshold: (threshold.at, threshold.kind)))


def _windows(config: Mapping[str, Any]) -> Iterator[Threshold]:
    kinds = config.get("layer_types")
    for key, (kind, layers) in _WINDOWS.items():
        size = config.get(key)
        if not _is_size(size):
            continue
        if isinstance(kinds, (list, tuple)) and layers is not None and layers not in kinds:
            continue
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        yield Threshold(kind, size)


def _rotary(config: Mapping[str, Any]) -> Iterator[Threshold]:
    for scaling in rotary_scalings(config):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in _SWITCHING:
            continue
        sizes = (scaling.get(_ORIGINAL), config.get(_ORIGINAL), config.get(_POSITIONS))
        at = next((size for size in sizes if _is_size(size)), None)
        if at is not None:
            yield Threshold(f"{kind} rotary embedding", at, switching=True)


def rotary_scalings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config says of its rotary embeddings: of all layers, or of each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        scaling = config.get(key)
        if isinstance(scaling, Mapping):
            yield scaling
            yield from (part for part in scaling.values() if isinstance(part, Mapping))


def _is_size(size: Any) -> TypeGuard[int]:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
