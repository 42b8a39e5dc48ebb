"""Reads weights in bitsandbytes' formats as the floats that its `dequantize_4bit` returns.

4 bits: `X.weight` contains the packed codes; further tensors are `.absmax`, `.quant_map`, with
double quantization `.nested_absmax` and `.nested_quant_map`, and JSON in the bytes of
`.quant_state.bitsandbytes__nf4` (or `__fp4`). 8 bits (LLM.int8): `X.weight` is int8, `X.SCB` the
largest magnitude of each row. bitsandbytes itself is not needed.

The values are rounded to the dtype that the weight had, as `dequantize_4bit` and PEFT's merge do. A
layer that computes in another dtype (`bnb_4bit_compute_dtype`) differs by that rounding from
bitsandbytes 0.50 on, whose matmul converts float32 directly to the dtype of its input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, ByRows, StoredTensor
from adaptrix_export.load.quantized.four_bit import BLOCK_SIZES, LEVELS, scaled_levels, unpack
from adaptrix_export.plan import Array, Tensor

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MAX_STATE = 4096  # bytes; a real one has about 200
RECIPROCAL_127 = np.float32(7.874015718698502e-3)  # as bitsandbytes spells 1/127
DAMAGED = "save or fetch the checkpoint again"


@dataclass(frozen=True)
class Nested:
    """Double quantization: `absmax = levels[number] * scales[block] + offset`, in float32."""

    scales: StoredTensor
    levels: StoredTensor
    block: int
    offset: float


@dataclass(frozen=True)
class FourBitTensor(ByRows):
    """An NF4 or FP4 matrix that reads as the dtype that it was quantized from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # "nf4" or "fp4"
    block: int
    packed: StoredTensor  # as bytes, one dimension
    absmax: StoredTensor
    nested: Nested | None = None

    def rows(self, start: int, stop: int) -> Array:
        row = prod(self.shape[1:])
        first, last = start * row, stop * row
        numbers = unpack(self.packed.rows(first // 2, ceil(last / 2)), first, last)
        absmax = self._absmax(first // self.block, ceil(last / self.block))
        values = scaled_levels(numbers, LEVELS[self.kind], absmax, self.block, first)
        # One rounding, from float32, as for the live layer's weight.
        return values.astype(DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])

    def _absmax(self, start: int, stop: int) -> Array:
        stored = self.absmax.rows(start, stop)
        if self.nested is None:
            return stored.astype(np.float32)
        block = self.nested.block
        scales = self.nested.scales.rows(start // block, ceil(stop / block)).astype(np.float32)
        levels = self.nested.levels.read().astype(np.float32)
        return scaled_levels(stored, levels, scales, block, start) + np.float32(self.nested.offset)


@dataclass(frozen=True)
class EightBitTensor(ByRows):
    """An LLM.int8 matrix: `number * SCB of its row / 127` in float32, rounded to `dtype`."""

    name: str
    dtype: str
    stored: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Array:
        numbers = self.stored.rows(start, stop).astype(np.float32)
        scaled = numbers * self.scales.rows(start, stop).reshape(-1, 1) * RECIPROCAL_127
        return scaled.astype(DTYPES[self.dtype])


Stored = Mapping[str, StoredTensor]


def read_bitsandbytes(place: str, stored: Stored, dtype: str) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, each quantized weight with its parts as one tensor.

    8-bit weights read as `dtype`. Raises SourceError for a part that is missing, without a weight
    or of the wrong size, UnsupportedError for an unsupported layout.
    """
    states = {name.partition(STATE)[0]: name for name in stored if STATE in name}
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in stored:
        if name in states:
            tensors[name], parts = _four_bit(place, name, states[name], stored)
            used |= parts
        elif name.removesuffix("weight") + "SCB" in stored and name.endswith(".weight"):
            tensors[name], parts = _eight_bit(place, name, stored, dtype)
            used |= parts
    for name, tensor in stored.items():
        if name in tensors or name in used:
            continue
        if STATE in name or name.endswith((*PARTS, ".SCB")) or tensor.dtype not in FLOATS:
            raise SourceError(
                f"{place}: {name}", f"dtype {tensor.dtype}, and no quantized weight that it is of",
                "each part with its weight and quant_state", DAMAGED,
            )  # fmt: skip
        tensors[name] = tensor
    return {name: tensors[name] for name in stored if name in tensors}


def _four_bit(place: str, name: str, key: str, stored: Stored) -> tuple[Tensor, set[str]]:
    state = _state(f"{place}: {key}", stored[key])
    kind = key.partition(STATE)[2]
    facts = _facts(f"{place}: {key}", state, kind)
    count = prod(facts.shape)
    blocks = ceil(count / facts.block)
    nested_names = [name + p for p in PARTS[2:] if name + p in stored]
    nested: Nested | None = None
    absmax = _part(place, stored, name + ".absmax", blocks, ("U8",) if nested_names else FLOATS)
    if nested_names:
        block, offset = _nested_facts(f"{place}: {key}", state)
        nested = Nested(
            _part(place, stored, name + ".nested_absmax", ceil(blocks / block), FLOATS),
            _part(place, stored, name + ".nested_quant_map", 256, ("F32",)),
            block,
            offset,
        )
    levels = _part(place, stored, name + ".quant_map", 16, ("F32",))
    _check_levels(f"{place}: {name}.quant_map", levels.read(), kind)
    packed = stored[name]
    if packed.nbytes != ceil(count / 2 / _width(packed)) * _width(packed):
        raise SourceError(
            f"{place}: {name}", f"{packed.nbytes} bytes", f"{ceil(count / 2)} for {count} values",
            DAMAGED,
        )  # fmt: skip
    as_bytes = replace(packed, dtype="U8", shape=(packed.nbytes,))
    tensor = FourBitTensor(
        packed.name, facts.dtype, facts.shape, kind, facts.block, as_bytes, absmax, nested
    )
    return tensor, {key, name + ".absmax", name + ".quant_map", *nested_names}


def _width(packed: StoredTensor) -> int:
    """Size of the container's elements in bytes: FSDP may store the same bytes as bfloat16."""
    return DTYPES[packed.dtype].itemsize


def _state(place: str, tensor: StoredTensor) -> dict[str, Any]:
    """The JSON object in the bytes of a quant_state."""
    if tensor.dtype != "U8" or tensor.nbytes > MAX_STATE:
        raise SourceError(
            place, f"{tensor.nbytes} bytes of {tensor.dtype}", f"at most {MAX_STATE} of U8", DAMAGED
        )
    try:
        state = json.loads(tensor.read().tobytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(place, f"not JSON ({error})", "a quant state", DAMAGED) from error
    if not isinstance(state, dict):
        raise SourceError(place, f"a JSON {type(state).__name__}", "a JSON object", DAMAGED)
    return state


@dataclass(frozen=True)
class _Facts:
    block: int
    shape: tuple[int, ...]
    dtype: str


def _facts(place: str, state: Mapping[str, Any], kind: str) -> _Facts:
    """Block size, shape and dtype of a quant state, each checked."""
    if kind not in LEVELS or state.get("quant_type") != kind:
        raise SourceError(
            place, f"quant_type {state.get('quant_type')!r}", " or ".join(LEVELS), DAMAGED
        )
    block, shape, dtype = state.get("blocksize"), state.get("shape"), state.get("dtype")
    if type(block) is not int or block not in BLOCK_SIZES:
        raise SourceError(place, f"blocksize {block!r}", " ".join(map(str, BLOCK_SIZES)), DAMAGED)
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise SourceError(place, f"shape {shape!r}", "two sizes, [out, in]", DAMAGED)
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise SourceError(place, f"dtype {dtype!r}", " ".join(TORCH_DTYPES), DAMAGED)
    return _Facts(block, tuple(sizes), TORCH_DTYPES[dtype])


def _nested_facts(place: str, state: Mapping[str, Any]) -> tuple[int, float]:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block not in BLOCK_SIZES:
        expected = " ".join(map(str, BLOCK_SIZES))
        raise SourceError(place, f"nested_blocksize {block!r}", expected, DAMAGED)
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise SourceError(place, f"nested_offset {offset!r}", "a finite number", DAMAGED)
    return block, float(offset)


def _part(
    place: str, stored: Stored, name: str, count: int, dtypes: tuple[str, ...]
) -> StoredTensor:
    """A tensor that belongs to a quantized weight, of `count` values, as one row."""
    tensor = stored.get(name)
    expected = f"{count} values of {' or '.join(dtypes)}"
    if tensor is None:
        raise SourceError(f"{place}: {name}", "missing", expected, DAMAGED)
    if prod(tensor.shape) != count or tensor.dtype not in dtypes:
        actual = f"{prod(tensor.shape)} values of {tensor.dtype}"
        raise SourceError(f"{place}: {name}", actual, expected, DAMAGED)
    return replace(tensor, shape=(count,))


def _check_levels(place: str, levels: Array, kind: str) -> None:
    """Refuse a table of other levels: bitsandbytes would ignore it and use those of the kind."""
    if not np.allclose(levels, LEVELS[kind], rtol=0, atol=1e-4):
        raise UnsupportedError(
            place, f"levels {np.round(levels, 3).tolist()}", f"those of {kind}",
            "bitsandbytes would ignore them; use the original weights",
        )  # fmt: skip


def _eight_bit(place: str, name: str, stored: Stored, dtype: str) -> tuple[Tensor, set[str]]:
    weight = stored[name]
    module = name.removesuffix("weight")
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise SourceError(
            f"{place}: {name}", f"{weight.dtype} of shape {list(weight.shape)}",
            "an I8 matrix, as it has an SCB", DAMAGED,
        )  # fmt: skip
    scales = _part(place, stored, module + "SCB", weight.shape[0], ("F32",))
    used = {module + "SCB"}
    if module + "weight_format" in stored:
        used.add(module + "weight_format")
        layout = _part(place, stored, module + "weight_format", 1, ("U8",)).read()
        if layout[0] != 0:
            raise UnsupportedError(
                f"{place}: {name}", f"weight_format {int(layout[0])}", "0 (rows)",
                "tiled for one GPU; save it again with bitsandbytes 0.45 or later",
            )  # fmt: skip
    return EightBitTensor(weight.name, dtype, weight, scales), used
