"""Merged values of one tensor, a block of rows at a time.

The sum is taken in float64 and rounded once, to the dtype that is written. An fp32 sum rounded to
bf16 would differ from the exact result near ties; and a block at a time keeps memory bounded by
the block, whatever the size of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adaptrix_export.load.tensors import DTYPES
from adaptrix_export.plan import Array, Change, Tensor

BLOCK = 1 << 19  # values in a block: 4 MB in float64, about what a core's cache holds


def to_dtype(exact: Array, dtype: str) -> Array:
    """Round float64 values to a safetensors dtype, to nearest even, in one rounding."""
    if dtype == "BF16":
        # bfloat16 has no direct conversion from float64, and two roundings are not one. Rounding
        # to odd first keeps what the second needs to know: https://hal.science/inria-00080427.
        return _to_odd_float32(exact).astype(DTYPES["BF16"])
    return exact.astype(DTYPES[dtype])


def _to_odd_float32(exact: Array) -> Array:
    """float32 values, the inexact ones rounded so that their last bit is one."""
    near: Array = exact.astype(np.float32)
    bits = near.view(np.int32)
    back = near.astype(np.float64)
    even = (back != exact) & np.isfinite(back) & ((bits & 1) == 0)
    # An even neighbour is left towards the exact value: away from zero if it is too small.
    bits[even] += np.where(np.abs(back[even]) > np.abs(exact[even]), -1, 1).astype(np.int32)
    return near


def rows_per_block(shape: tuple[int, ...]) -> int:
    """How many rows make a block of about BLOCK values."""
    row = int(np.prod(shape[1:], dtype=np.int64)) or 1
    return max(1, BLOCK // row)


def merged_blocks(change: Change, dtype: str) -> Iterator[Array]:
    """Blocks of rows of the merged tensor in `dtype`, in order."""
    source = change.replacement if change.replacement is not None else change.base
    assert source is not None, change.name
    factors = [_factors(change, term.a, term.b, term.scale) for term in change.terms]
    rows = source.shape[0] if source.shape else 1
    step = rows_per_block(source.shape)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        exact = source.rows(start, stop).astype(np.float64)
        for left, right in factors:
            exact += left[start:stop] @ right
        yield to_dtype(exact, dtype)


def _factors(change: Change, a: Tensor, b: Tensor, scale: float) -> tuple[Array, Array]:
    """(left, right) in float64 with left @ right = the delta as the base stores it."""
    down, up = a.read().astype(np.float64), b.read().astype(np.float64)
    if change.transposed:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(scale * up.T)
    return up, scale * down


def merged(change: Change, dtype: str) -> Array:
    """The whole merged tensor in `dtype`."""
    blocks = list(merged_blocks(change, dtype))
    return np.concatenate(blocks) if len(blocks) > 1 else blocks[0]


def plain_blocks(tensor: Tensor, dtype: str) -> Iterator[Array]:
    """Blocks of an unchanged tensor, converted to `dtype`."""
    rows = tensor.shape[0] if tensor.shape else 1
    if not tensor.shape:
        yield tensor.read().astype(DTYPES[dtype])
        return
    step = rows_per_block(tensor.shape)
    for start in range(0, rows, step):
        yield tensor.rows(start, min(rows, start + step)).astype(DTYPES[dtype])
