"""A weight plus low-rank terms, in strips of rows that fit into a core's cache.

Tried without gain: computing in float32, and in float64 only where the error bound leaves the
rounding open. On CPUs without AVX-512 the checks cost as much as the float64 product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.plan import Array

STRIP = 1 << 15  # values: 256 KB in float64
PIECE = 16  # rows in a product
SMALL = 1_000_000  # multiplications up to which OpenBLAS does not pack, the slowest part


@dataclass(frozen=True)
class Thin:
    """The terms `left @ right`, (rows, r) @ (r, columns) in float64, in the weight's layout."""

    terms: Sequence[tuple[Array, Array]]

    def added_to(self, base: Array, start: int, dtype: str) -> Array:
        """`base`, stored rows of the weight from `start` on, plus the terms, in `dtype`."""
        flat = base.reshape(len(base), -1)
        out = np.empty(flat.shape, DTYPES[dtype])
        step = _strip_rows(flat)
        room = np.empty((step, flat.shape[1]))
        for first in range(0, len(flat), step):
            exact = flat[first : first + step].astype(np.float64)
            delta = room[: len(exact)]
            for left, right in self.terms:
                _multiply(left[start + first : start + first + len(exact)], right, delta)
                exact += delta
            out[first : first + step] = to_dtype(exact, dtype)
        return out.reshape(base.shape)


def _multiply(left: Array, right: Array, out: Array) -> None:
    """`left @ right` into `out`, in pieces that OpenBLAS multiplies without packing."""
    width = max(64, SMALL // (PIECE * max(1, len(right))))
    for row in range(0, len(left), PIECE):
        for column in range(0, right.shape[1], width):
            piece = (slice(row, row + PIECE), slice(column, column + width))
            np.matmul(left[piece[0]], right[:, piece[1]], out=out[piece])


def _strip_rows(block: Array) -> int:
    """A multiple of PIECE, of about STRIP values."""
    columns: int = block.shape[1]
    return max(PIECE, STRIP // max(1, columns) // PIECE * PIECE)
