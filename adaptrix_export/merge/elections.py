"""Selects values of deltas by magnitude, and by an elected sign (TIES).

Values that are equal in exact arithmetic differ in floating point: products that cancel leave
1e-17, and equal magnitudes differ in the last bit. So every comparison here has a margin, far above
float64 rounding and far below meaningful differences; values within it count as equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from adaptrix_export.merge.blocks import Block, rows_per_block
from adaptrix_export.plan import Array

MARGIN = 2.0**-40  # relative


def threshold_of(blocks: Sequence[Array], density: float) -> float:
    """The smallest magnitude among the largest floor(density * n) of n values, at least one value.

    Values of equal magnitude are treated alike: all that equal the threshold are selected.
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


def random_mask(
    seed: int, adapter: str, name: str, shape: tuple[int, int], density: float
) -> Block:
    """Random keep masks (DARE), by rows: a function of seed, adapter and name.

    Philox keyed by the first 16 bytes of sha256("seed newline adapter newline name"), read as a
    little-endian number; values row by row in the base's layout, kept where a uniform double in
    [0, 1) is below `density`. Stored as bits.
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
