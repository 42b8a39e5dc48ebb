"""Weights of `quant_method: compressed-tensors`, as llm-compressor saves them: int4, int8, fp8.

    pack-quantized    X.weight_packed (out, in packed) in int32, X.weight_shape, X.weight_scale
    int-quantized     X.weight int8, X.weight_scale
    float-quantized   X.weight F8_E4M3, X.weight_scale

with `X.weight_zero_point` where the numbers are not symmetric. A scale belongs to the whole
tensor, to a row (out, 1), to a group of columns (out, groups), or to a tile; W = (number - zero) *
scale, in the model's dtype. Packed numbers have 2**(bits - 1) added; zero points are packed along
the rows.
Format: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, StoredTensor
from adaptrix_export.load.quantized.bits import Whole, unpack_words, words_of
from adaptrix_export.load.quantized.parts import DAMAGED, check_part
from adaptrix_export.plan import Array, Tensor

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
BITS = (4, 8)
NUMBERS = ("I8", "F8_E4M3")
# Parts of a module that round what flows through it, not what is stored.
FLOWING = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale",
    "q_scale", "input_global_scale",
)  # fmt: skip
_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class CompressedTensor(Whole):
    """`bits` are those of packed numbers, 0 where each has a place of its own; `tile` is (rows,
    columns) that share a scale."""

    name: str
    dtype: str
    shape: tuple[int, int]
    numbers: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    bits: int
    tile: tuple[int, int]

    @property
    def form(self) -> str:
        if self.bits:
            return f"packed {self.bits} bits"
        return "int8" if self.numbers.dtype == "I8" else "fp8"

    def decode(self) -> Array:
        """One rounding, in the dtype of the scales as the model loads them."""
        dtype = DTYPES[self.dtype]
        scales = self.scales.read().astype(dtype).astype(np.float32)
        numbers = self._numbers()
        if self.zeros is not None:
            numbers -= self._spread(self._zeros(self.zeros))
        scaled: Array = numbers * self._spread(scales)
        return scaled.astype(dtype)

    def _numbers(self) -> Array:
        stored = self.numbers.read()
        if not self.bits:
            return stored.astype(np.float32)
        return self._signed(unpack_words(stored, self.bits, self.shape[1], axis=1))

    def _zeros(self, zeros: StoredTensor) -> Array:
        stored = zeros.read()
        if zeros.dtype != "I32" or not self.bits:
            return stored.astype(np.float32)
        return self._signed(unpack_words(stored, self.bits, self.shape[0], axis=0))

    def _signed(self, numbers: Array) -> Array:
        signed: Array = numbers.astype(np.float32) - np.float32(2 ** (self.bits - 1))
        return signed

    def _spread(self, values: Array) -> Array:
        """One value, or one for each tile, as (out, in) or what broadcasts to it."""
        if values.size == 1:
            return values.reshape(1, 1)
        for axis, (size, tile) in enumerate(zip(self.shape, self.tile, strict=True)):
            if values.shape[axis] not in (1, size):
                values = values.take(np.arange(size) // tile, axis=axis)
        return values


def read_compressed(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, each compressed weight with its parts as one tensor.

    Raises SourceError for parts that do not fit each other, UnsupportedError for a format that is
    not read, and for columns that are not in their order.
    """
    _check_format(place, settings)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, ending = name.rpartition(".")
        whole = any(f"{module}.{word}" in stored for word in ("weight_packed", "weight"))
        if ending == "weight_packed" or (ending == "weight" and tensor.dtype in NUMBERS):
            live = f"{module}.weight"
            tensors[live] = _tensor(place, module, tensor, stored, settings, dtype)
        elif (whole and ending in _PARTS) or ending in FLOWING:
            continue
        elif tensor.dtype in FLOATS and ending not in _PARTS:
            tensors[name] = tensor
        else:
            raise SourceError(
                f"{place}: {name}", f"{tensor.dtype}, and no part of a compressed weight",
                "floats, or one of " + ", ".join(_PARTS), DAMAGED,
            )  # fmt: skip
    return tensors


def _check_format(place: str, settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    formats = {str(g.get("format") or settings.get("format")) for g in groups.values()
             if isinstance(g, dict)} or {str(settings.get("format"))}  # fmt: skip
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        formats.add(str(sparsity["format"]))
    other = sorted(formats - set(FORMATS))
    if other:
        raise UnsupportedError(
            f"{place}: quantization_config", f"the format {other[0]}", ", ".join(FORMATS),
            "name the unquantized model as the base",
        )  # fmt: skip


def _tensor(
    place: str,
    module: str,
    numbers: StoredTensor,
    stored: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    dtype: str,
) -> CompressedTensor:
    scales, zeros = (stored.get(f"{module}.weight_{part}") for part in ("scale", "zero_point"))
    shape, bits = numbers.shape, 0
    if f"{module}.weight_g_idx" in stored:
        raise UnsupportedError(
            f"{place}: {module}.weight_g_idx", "columns in the order of their activations",
            "columns in their own order", "name the unquantized model as the base",
        )  # fmt: skip
    if numbers.name.endswith("weight_packed"):
        shape = _stated_shape(place, stored.get(f"{module}.weight_shape"), module)
        bits = next((b for b in _bits(settings) if words_of(shape[1], b) == numbers.shape[1]), 0)
        check_part(place, numbers, ("I32",), (shape[0], words_of(shape[1], bits or BITS[0])))
    tile = _tile(scales.shape, shape, settings) if scales and len(shape) == 2 else None
    if scales is None or tile is None:
        what = "missing" if scales is None else f"shape {list(scales.shape)}"
        raise SourceError(
            f"{place}: {module}.weight_scale", what, f"scales of a matrix {list(shape)}", DAMAGED
        )
    check_part(place, scales, FLOATS, scales.shape)
    if zeros is not None:
        packed = (words_of(shape[0], bits), *scales.shape[1:]) if bits else ()
        fits = packed if zeros.dtype == "I32" and bits else scales.shape
        check_part(place, zeros, ("I32", *NUMBERS, *FLOATS), fits)
    name = f"{numbers.name.rpartition('.')[0]}.weight"
    return CompressedTensor(name, dtype, (shape[0], shape[1]), numbers, scales, zeros, bits, tile)


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each group of the config says of weights."""
    groups = settings.get("config_groups")
    rows = groups.values() if isinstance(groups, dict) else ()
    return [row["weights"] for row in rows if isinstance(row, dict) and row.get("weights")]


def _bits(settings: Mapping[str, Any]) -> list[int]:
    """The bits that the config's groups name, of those that are read."""
    named = {row.get("num_bits") for row in _weights(settings)}
    return [bits for bits in BITS if bits in named]


def _stated_shape(place: str, tensor: StoredTensor | None, module: str) -> tuple[int, int]:
    if tensor is None or prod(tensor.shape) != 2 or tensor.dtype not in ("I64", "I32"):
        raise SourceError(f"{place}: {module}.weight_shape", "no two sizes", "(out, in)", DAMAGED)
    rows, columns = (int(n) for n in tensor.read().reshape(-1))
    return rows, columns


def _tile(
    scales: tuple[int, ...], shape: tuple[int, ...], settings: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(rows, columns) that share one of the scales of this shape; None where they do not fit."""
    rows, columns = shape
    if prod(scales) == 1:
        return rows, columns
    if len(scales) != 2:
        return None
    for row in _weights(settings):
        block = row.get("block_structure") if row.get("strategy") == "block" else None
        if isinstance(block, list) and len(block) == 2:
            down, across = (max(1, int(size)) for size in block)
            if scales == (-(-rows // down), -(-columns // across)):
                return down, across
    whole = scales[0] in (1, rows) and 0 < scales[1] <= columns and not columns % scales[1]
    return (rows // scales[0], columns // scales[1]) if whole else None
