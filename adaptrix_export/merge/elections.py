"""Which values of several deltas survive: by magnitude, and by an elected sign (TIES).

What is equal on paper is rarely equal in floating point: two products that cancel leave 1e-17, and
values of one size differ in their last bit. So every comparison here has a margin far above the
noise of float64 and far below what a value means; what lies within it counts as equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from adaptrix_export.merge.blocks import Block, rows_per_block
from adaptrix_export.plan import Array

MARGIN = 2.0**-40  # relative


def threshold_of(blocks: Sequence[Array], density: float) -> float:
    """The magnitude from which on a value belongs to the largest `density` of all.

    Values of equal magnitude stay together: all of those as large as the last one that fits are
    kept. Of n values the largest floor(density * n) are meant, one at least.
    """
    sizes = np.concatenate([np.abs(block).reshape(-1) for block in blocks])
    count = max(1, int(density * sizes.size))
    sizes.partition(sizes.size - count)
    return float(sizes[sizes.size - count]) * (1 - MARGIN)


def largest_of(blocks: Sequence[Array]) -> float:
    """A magnitude below which a value of these counts as zero."""
    return MARGIN * max(float(np.abs(block).max(initial=0.0)) for block in blocks)


def elected(values: Sequence[Array], floors: Sequence[float], election: str) -> Array:
    """TIES, https://arxiv.org/abs/2306.01708: the mean of those values that have the elected sign.

    The sign is that of the sum ("total"), or that of most values and of the sum where there are as
    many of each ("frequency"); where the sum is zero, nothing is elected and the result is zero.
    `floors` are the magnitudes up to which values count as zero.
    """
    stack = np.stack([np.where(np.abs(v) > f, v, 0.0) for v, f in zip(values, floors, strict=True)])
    signs, total = np.sign(stack), stack.sum(axis=0)
    choice = np.where(np.abs(total) > MARGIN * np.abs(stack).sum(axis=0), np.sign(total), 0.0)
    if election == "frequency":
        majority = np.sign(signs.sum(axis=0))
        choice = np.where(majority != 0, majority, choice)
    agree = (signs == choice) & (choice != 0)
    count = np.maximum(agree.sum(axis=0), 1)
    mean: Array = np.where(agree, stack, 0.0).sum(axis=0) / count
    return mean


def drawn(seed: int, adapter: str, name: str, shape: tuple[int, int], density: float) -> Block:
    """The values that a random drop keeps, by rows: the same for a seed, an adapter and a name.

    Philox keyed by the first 16 bytes of sha256("seed newline adapter newline name"), read as a
    little-endian number; values row by row as the base stores them, kept where a uniform double in
    [0, 1) is below `density`. Held as bits.
    """
    key = sha256(f"{seed}\n{adapter}\n{name}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    step = rows_per_block(shape)
    packed = [
        np.packbits(generator.random((min(step, shape[0] - i), shape[1])) < density, axis=1)
        for i in range(0, shape[0], step)
    ]
    bits = np.concatenate(packed)
    return lambda start, stop: np.unpackbits(
        bits[start:stop], axis=1, count=shape[1]
    ).astype(bool)  # fmt: skip
