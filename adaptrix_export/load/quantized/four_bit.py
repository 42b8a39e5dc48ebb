"""The arithmetic of bitsandbytes' 4-bit formats, NF4 and FP4, with and without double quantization.

A matrix is flattened and split into blocks; a block stores its largest magnitude (`absmax`) and for
each value the number of the nearest of sixteen levels. A byte has two numbers, the first in the
high half. Double quantization stores the absmax values, minus their mean, in eight bits by the same
scheme with 256 levels and blocks of 256. NF4 and double quantization:
https://arxiv.org/abs/2305.14314; the 256 levels: https://arxiv.org/abs/1511.04561.

All arithmetic is float32, in the order of bitsandbytes 0.50, so that the bits are the same.
Dequantization is fully determined. Quantization follows the CUDA kernels
(csrc/cuda/blockwise_quantization.cu), since adapters are trained with them: the reciprocal of the
absmax, the nearest level. The CPU build gives the same NF4 numbers, but rounds about one 8-bit
scale in 700 to the second nearest level; and a GPU may take the other neighbour of a value within
one unit in the last place of halfway.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from adaptrix_export.plan import Array

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa, in the order of the bits; twelfths.
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
LEVELS: dict[str, Array] = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array(_FP4, np.float32) / np.float32(12),
}


def unpack(packed: Array, start: int, stop: int) -> Array:
    """Level numbers of values `start` to `stop` - 1; `packed` holds the bytes from `start // 2`."""
    both = np.empty(2 * len(packed), np.uint8)
    both[0::2], both[1::2] = packed >> 4, packed & 15
    first = start % 2
    return both[first : first + stop - start]


def pack(numbers: Array) -> Array:
    """Bytes of level numbers; an odd count is filled with zero bits."""
    even = np.concatenate([numbers, np.zeros(len(numbers) % 2, np.uint8)])
    packed: Array = (even[0::2] << 4) | even[1::2]
    return packed


def scaled_levels(numbers: Array, levels: Array, absmax: Array, block: int, start: int) -> Array:
    """float32 values of level numbers that begin at value `start` of the whole.

    `absmax` holds one value a block, beginning with the block that `start` lies in.
    """
    blocks = (start % block + np.arange(len(numbers))) // block
    product: Array = levels[numbers] * absmax[blocks]
    return product


def block_maxima(values: Array, block: int) -> Array:
    """The largest magnitude in each block of a float32 row; the last block may be short."""
    if not len(values):
        return np.zeros(0, np.float32)
    largest: Array = np.maximum.reduceat(np.abs(values), np.arange(0, len(values), block))
    return largest


def nf4_numbers(values: Array, absmax: Array, block: int) -> Array:
    """uint8 level numbers of a float32 row that begins with a block."""
    return _nearest(_scaled(values, absmax, block), LEVELS["nf4"])


def _scaled(values: Array, absmax: Array, block: int) -> Array:
    """Values relative to their block's absmax, times its reciprocal as in the kernel."""
    # A block of zeros is 0 * inf on the GPU; whatever level that gives is then scaled by zero.
    factors = np.float32(1) / np.where(absmax > 0, absmax, np.float32(1))
    product: Array = values * np.repeat(factors, block)[: len(values)]
    return product


def _nearest(scaled: Array, levels: Array) -> Array:
    """Numbers of the nearest of ascending levels; the lower one for values halfway between two."""
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    numbers: Array = np.searchsorted(bounds, scaled).astype(np.uint8)
    return numbers


@cache
def dynamic_levels() -> Array:
    """The 256 levels of the dynamic 8-bit format: seven exponents, each with twice the
    fractions."""
    import torch  # bitsandbytes takes its linspace; numpy's differs in last bits

    data: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        data += [*means.tolist(), *(-means).tolist()]
    levels: Array = np.array(sorted([*data, 0.0, 1.0]), np.float32)
    return levels


def nested_round_trip(absmax: Array) -> Array:
    """All absmax values of a tensor after double quantization, float32.

    The mean is that of torch on the CPU; a GPU sums in another order, which may change its last
    bit.
    """
    import torch

    offset = np.float32(torch.from_numpy(absmax).mean().item())
    shifted = absmax - offset
    largest = block_maxima(shifted, NESTED_BLOCK)
    numbers = _nearest(_scaled(shifted, largest, NESTED_BLOCK), dynamic_levels())
    restored: Array = scaled_levels(numbers, dynamic_levels(), largest, NESTED_BLOCK, 0) + offset
    return restored
