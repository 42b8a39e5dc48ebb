"""Blocks of rows, the unit in which a merge reads, computes and writes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adaptrix_export.plan import Array, Change

BLOCK = 1 << 19  # values in a block: 4 MB in float64, about what a core's cache holds
# (start, stop, rows of the base, the same with the terms before this one added) -> what to add
Rows = Callable[[int, int, Array, Array], Array]
Block = Callable[[int, int], Array]  # (start, stop) -> rows of a delta, two-dimensional


def rows_per_block(shape: tuple[int, ...]) -> int:
    """Number of rows in a block of about BLOCK values."""
    row = int(np.prod(shape[1:], dtype=np.int64)) or 1
    return max(1, BLOCK // row)


def base_rows(change: Change, start: int, stop: int) -> Array:
    """Rows of the tensor that terms are added to, in float64: the source with replaced rows."""
    exact = change.source.rows(start, stop).astype(np.float64)
    for saved in change.rows:
        assert saved.rows is not None
        for place, row in enumerate(saved.rows):
            if start <= row < stop:
                exact[row - start] = saved.tensor.rows(place, place + 1)[0].astype(np.float64)
    return exact
