"""A weight plus low-rank terms, in strips of rows that stay in a core's cache.

Screening in float32, and computing in float64 only what its error bound leaves open, was tried: on
CPUs without AVX-512 the checks cost as much as the wider product.
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
SMALL = 1_000_000  # multiplications: up to here OpenBLAS does not pack, which takes longest


@dataclass(frozen=True)
class Thin:
    """`left @ right` of each term, (rows, r) @ (r, columns) in float64, laid out as the weight."""

    terms: Sequence[tuple[Array, Array]]

    def added_to(self, base: Array, start: int, dtype: str) -> Array:
        """`base`, the weight's rows from `start` on as they are stored, plus the terms."""
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
    """`left @ right` into `out`, in pieces that OpenBLAS takes as they lie."""
    width = max(64, SMALL // (PIECE * max(1, len(right))))
    for row in range(0, len(left), PIECE):
        for column in range(0, right.shape[1], width):
            piece = (slice(row, row + PIECE), slice(column, column + width))
            np.matmul(left[piece[0]], right[:, piece[1]], out=out[piece])


def _strip_rows(block: Array) -> int:
    """A multiple of PIECE, of about STRIP values."""
    columns: int = block.shape[1]
    return max(PIECE, STRIP // max(1, columns) // PIECE * PIECE)
