"""Plain weights, read as if bitsandbytes had quantized them to 4 bits and dequantized them.

For adapters that were trained on a base quantized while loading (`load_in_4bit`), if only the
original is available: the merge then starts from the values that training used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, ByRows
from adaptrix_export.load.quantized.four_bit import (
    LEVELS,
    block_maxima,
    nested_round_trip,
    nf4_numbers,
    scaled_levels,
)
from adaptrix_export.plan import Array, Base, Site, Tensor

BLOCK = 64  # what bitsandbytes and transformers quantize with
# The recipe's words -> whether scales are quantized, too (double quantization).
SIMULATED = {"nf4": False, "nf4-double": True}
FLOAT_DTYPES = ("F32", "F16", "BF16")
_READ = 1 << 22  # values at a time while the scales of a tensor are collected


@dataclass(frozen=True)
class SimulatedTensor(ByRows):
    """`source` quantized to NF4 and dequantized to its own dtype, like bitsandbytes."""

    source: Tensor
    double: bool
    turned: bool = False  # stored (in, out), quantized as (out, in)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def rows(self, start: int, stop: int) -> Array:
        if self.turned:
            return _transposed_round_trip(self)[start:stop]
        row = prod(self.shape[1:])
        # From the block that row `start` begins in to the end of the one that `stop` - 1 ends in.
        first = start * row // BLOCK * BLOCK
        last = min(self.shape[0] * row, ceil(stop * row / BLOCK) * BLOCK)
        top = first // row
        read = self.source.rows(top, ceil(last / row)).astype(np.float32).reshape(-1)
        values = read[first - top * row : last - top * row]
        absmax = block_maxima(values, BLOCK)
        scales = absmax
        if self.double:
            scales = _nested_absmax(self)[first // BLOCK : ceil(last / BLOCK)]
        restored = self._round_trip(values, absmax, scales)
        return restored[start * row - first : stop * row - first].reshape(-1, *self.shape[1:])

    def _round_trip(self, values: Array, absmax: Array, scales: Array) -> Array:
        numbers = nf4_numbers(values, absmax, BLOCK)
        exact = scaled_levels(numbers, LEVELS["nf4"], scales, BLOCK, 0)
        return exact.astype(DTYPES[self.dtype])


@lru_cache(maxsize=1)
def _nested_absmax(tensor: SimulatedTensor) -> Array:
    """The scales of all blocks after double quantization, which subtracts their mean."""
    row = prod(tensor.shape[1:])
    # Whole blocks at a time: this many rows are a multiple of BLOCK values.
    step = max(BLOCK, _READ // row // BLOCK * BLOCK)
    pieces = []
    for start in range(0, tensor.shape[0], step):
        read = tensor.source.rows(start, min(tensor.shape[0], start + step))
        pieces.append(block_maxima(read.astype(np.float32).reshape(-1), BLOCK))
    return nested_round_trip(np.concatenate(pieces))


@lru_cache(maxsize=1)
def _transposed_round_trip(tensor: SimulatedTensor) -> Array:
    values = np.ascontiguousarray(tensor.source.read().T).astype(np.float32)
    absmax = block_maxima(values.reshape(-1), BLOCK)
    scales = nested_round_trip(absmax) if tensor.double else absmax
    return tensor._round_trip(values.reshape(-1), absmax, scales).reshape(values.shape).T


def simulate(base: Base, word: str) -> Base:
    """The base with simulated quantization of the weights that bitsandbytes would quantize.

    Those are all Linear layers except the head, the default of `llm_int8_skip_modules`. Raises
    UnsupportedError if the header does not show which they are.
    """
    if word not in SIMULATED:
        raise UnsupportedError(
            f"simulate: {word}", "a format that cannot be told from the weights",
            " or ".join(SIMULATED),
            "16-bit weights often lie halfway between two levels of FP4, where builds of "
            "bitsandbytes differ; save the quantized base and name that",
        )  # fmt: skip
    experts = next((name for name in base.tensors if ".experts." in name), None)
    if experts:
        raise UnsupportedError(
            f"{base.spec}: {experts}", "a mixture of experts", "plain Linear layers",
            "whether bitsandbytes quantized the experts depends on the version of transformers; "
            "save the quantized base and name that",
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, tensor in base.tensors.items():
        turned = base.architecture.is_transposed(_site(base, name))
        linear = _is_linear(base, name, tensor)
        tensors[name] = SimulatedTensor(tensor, SIMULATED[word], turned) if linear else tensor
    return replace(base, tensors=tensors, rebuilt=True, simulated=word)


def _site(base: Base, name: str) -> Site:
    return base.architecture.site_of(name.rpartition(".")[0])


def _is_linear(base: Base, name: str, tensor: Tensor) -> bool:
    """Whether bitsandbytes would quantize the tensor."""
    site, family = _site(base, name), base.architecture.family
    if len(tensor.shape) != 2 or not name.endswith(".weight"):
        return False
    if site.layer is None:
        if site.path == family.head or base.architecture.is_transposed(site):
            return False  # head and embeddings keep their dtype
        raise UnsupportedError(
            f"{base.spec}: {name}", "a matrix outside the layers", "embeddings and a head alone",
            "the header does not tell a Linear from an Embedding; save the quantized base and "
            "name that",
        )  # fmt: skip
    if tensor.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"{base.spec}: {name}", f"dtype {tensor.dtype}", " ".join(FLOAT_DTYPES),
            "bitsandbytes quantizes no other",
        )  # fmt: skip
    return True
