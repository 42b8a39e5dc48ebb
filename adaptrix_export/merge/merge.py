"""Merged values of one tensor, a block of rows at a time.

The sum is computed in float64 and rounded once, to the dtype that is written. An fp32 sum rounded
to bf16 would differ from the exact result near ties. Memory is bounded by the block, whatever the
size of the tensor. Sums of LoRA terms, the most common case, are computed by threads while earlier
blocks are hashed and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.merge.ahead import ahead
from adaptrix_export.merge.blocks import Rows, base_rows, rows_per_block
from adaptrix_export.merge.composed import composed_rows
from adaptrix_export.merge.leaves import leaf_rows, scaled_factors
from adaptrix_export.merge.overflow import within_float16
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.merge.thin import Thin
from adaptrix_export.plan import Array, Change, Composed, LowRank, Tensor, Term, low_ranks


def merged_blocks(
    change: Change, dtype: str, first: int = 0, last: int | None = None
) -> Iterator[Array]:
    """Blocks of rows `first` to `last`-1 of the merged tensor in `dtype`, in order.

    Raises AdapterError for a value that overflows float16.
    """
    blocks = _merged_blocks(change, dtype, first, last)
    yield from within_float16(change, blocks) if dtype == "F16" else blocks


def _merged_blocks(change: Change, dtype: str, first: int, last: int | None) -> Iterator[Array]:
    low_rank = _low_rank_terms(change)
    if low_rank:
        yield from ahead(_thin_blocks(change, low_rank, dtype, first, last))
        return
    source = change.source
    added = [added_rows(change, term) for term in change.terms]
    rows = source.shape[0] if source.shape else 1
    rows = rows if last is None else last
    step = rows_per_block(source.shape)
    for start in range(first, rows, step):
        stop = min(rows, start + step)
        exact = base_rows(change, start, stop)
        # A single term is computed in full before it is added, so it may read `exact` itself.
        keep_base = len(added) > 1 or change.blend != 1
        base = exact.copy() if keep_base else exact
        for term in added:
            exact += term(start, stop, base, exact)
        if change.blend != 1:
            exact = base + change.blend * (exact - base)
        yield to_dtype(exact, dtype)


def _low_rank_terms(change: Change) -> list[LowRank]:
    """The terms, if all are LoRA terms and nothing else changes the tensor; else an empty list."""
    terms = low_ranks(change.terms)
    lone = not change.rows and change.blend == 1 and len(change.source.shape) > 1
    return terms if lone and len(terms) == len(change.terms) else []


def _thin_blocks(
    change: Change, terms: list[LowRank], dtype: str, first: int, last: int | None
) -> Iterator[Callable[[], Array]]:
    """A task for each block. Rows are read here, since not every source is safe for threads."""
    source = change.source
    thin = Thin([scaled_factors(change, term) for term in terms])
    last = source.shape[0] if last is None else last
    step = rows_per_block(source.shape)
    for start in range(first, last, step):
        base = source.rows(start, min(last, start + step))
        yield partial(thin.added_to, base, start, dtype)


def added_rows(change: Change, term: Term) -> Rows:
    """The delta of one term, by rows in the base's layout."""
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
