"""Merged values of one tensor, a block of rows at a time.

The sum is taken in float64 and rounded once, to the dtype that is written. An fp32 sum rounded to
bf16 would differ from the exact result near ties; and a block at a time keeps memory bounded by
the block, whatever the size of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.merge.blocks import Rows, base_rows, rows_per_block
from adaptrix_export.merge.composed import composed_rows
from adaptrix_export.merge.leaves import leaf_rows
from adaptrix_export.plan import Array, Change, Composed, Tensor, Term


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


def merged_blocks(
    change: Change, dtype: str, first: int = 0, last: int | None = None
) -> Iterator[Array]:
    """Blocks of rows `first` to `last`-1 of the merged tensor in `dtype`, in order."""
    source = change.source
    added = [added_rows(change, term) for term in change.terms]
    rows = source.shape[0] if source.shape else 1
    rows = rows if last is None else last
    step = rows_per_block(source.shape)
    for start in range(first, rows, step):
        stop = min(rows, start + step)
        exact = base_rows(change, start, stop)
        kept = len(added) > 1 or change.blend != 1  # a lone term is made before it is added
        base = exact.copy() if kept else exact
        for term in added:
            exact += term(start, stop, base, exact)
        if change.blend != 1:
            exact = base + change.blend * (exact - base)
        yield to_dtype(exact, dtype)


def added_rows(change: Change, term: Term) -> Rows:
    """What one term adds, by rows as the base stores them."""
    if isinstance(term, Composed):
        return composed_rows(change, term)
    return leaf_rows(change, term)


def merged(change: Change, dtype: str, first: int = 0, last: int | None = None) -> Array:
    """Rows `first` to `last`-1 of the merged tensor in `dtype`: by default all."""
    blocks = list(merged_blocks(change, dtype, first, last))
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
