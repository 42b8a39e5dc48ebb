"""Weights of `quant_method: fp8`: float8 values with one scale for each tensor or tile.

`X.weight` (F8_E4M3) times `X.weight_scale_inv`, which has one value, or one for each tile of
`weight_block_size`; in float32, rounded once, like transformers' `Fp8Dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, ByRows, StoredTensor
from adaptrix_export.plan import Array, Tensor

SCALE, ACTIVATION = "_scale_inv", "activation_scale"


@dataclass(frozen=True)
class Fp8Tensor(ByRows):
    """`tile`: (rows, columns) that share a scale; None if the tensor has one scale."""

    name: str
    dtype: str
    stored: StoredTensor
    scales: StoredTensor
    tile: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Array:
        numbers = self.stored.rows(start, stop).astype(np.float32)
        scales = self.scales.read().astype(np.float32)
        if self.tile is None:
            return (numbers * scales.reshape(())).astype(DTYPES[self.dtype])
        down, across = (np.arange(n) // t for n, t in zip(self.shape, self.tile, strict=True))
        spread = scales[down[start:stop]][:, across]
        scaled: Array = (numbers * spread).astype(DTYPES[self.dtype])
        return scaled


def read_fp8(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, float8 weights reading as `dtype`.

    Scales of activations are ignored, since they do not change weights. Raises SourceError for
    scales that are missing or have another shape.
    """
    tile = _tile(place, settings)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        scaled = name.removesuffix(SCALE)
        if name.endswith((ACTIVATION, "activation_scheme")) or (
            scaled != name and scaled in stored
        ):
            continue
        if tensor.dtype in FLOATS and scaled == name:
            tensors[name] = tensor
            continue
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2:
            raise UnsupportedError(
                f"{place}: {name}", f"{tensor.dtype} of shape {list(tensor.shape)}",
                "floats, or F8_E4M3 matrices with scales", "use the original weights",
            )  # fmt: skip
        scales = stored.get(name + SCALE)
        tensors[name] = Fp8Tensor(
            tensor.name, dtype, tensor, _check_scales(place, tensor, scales, name, tile), tile
        )
    return tensors


def _tile(place: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    sizes = settings.get("weight_block_size")
    if sizes is None:
        return None
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(type(n) is int and n > 0 for n in sizes)
    ):
        raise SourceError(
            f"{place}: quantization_config", f"weight_block_size {sizes!r}", "two sizes, or null"
        )
    return sizes[0], sizes[1]


def _check_scales(
    place: str,
    weight: StoredTensor,
    scales: StoredTensor | None,
    name: str,
    tile: tuple[int, int] | None,
) -> StoredTensor:
    """The scales of one weight, or SourceError if their shape does not fit."""
    expected = tuple(ceil(n / t) for n, t in zip(weight.shape, tile, strict=True)) if tile else ()
    shape = None if scales is None else scales.shape
    fits = scales is not None and (shape == expected if tile else prod(scales.shape) == 1)
    if scales is None or not fits or scales.dtype not in FLOATS:
        what = "missing" if scales is None else f"{scales.dtype} of shape {list(scales.shape)}"
        raise SourceError(
            f"{place}: {name}{SCALE}", what, f"floats of shape {list(expected)}",
            "save or fetch the checkpoint again",
        )  # fmt: skip
    return scales
