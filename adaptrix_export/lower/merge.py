"""Merged values of one tensor, a block of rows at a time.

The sum is taken in float64 and rounded once, to the dtype that is written. An fp32 sum rounded to
bf16 would differ from the exact result near ties; and a block at a time keeps memory bounded by
the block, whatever the size of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adaptrix_export.load.tensors import DTYPES
from adaptrix_export.plan import Array, Change, Dora, LowRank, Scaled, Tensor, Tuned

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


Rows = Callable[[int, int, Array], Array]  # (start, stop, base rows) -> what to add to them


def merged_blocks(change: Change, dtype: str) -> Iterator[Array]:
    """Blocks of rows of the merged tensor in `dtype`, in order."""
    source = change.source
    added = [_ADDED[type(term)](change, term) for term in change.terms]
    rows = source.shape[0] if source.shape else 1
    step = rows_per_block(source.shape)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        base = base_rows(change, start, stop)
        exact = base.copy() if added else base
        for term in added:
            exact += term(start, stop, base)
        yield to_dtype(exact, dtype)


def base_rows(change: Change, start: int, stop: int) -> Array:
    """Rows of what the terms are added to, in float64: the source, with some rows set."""
    exact = change.source.rows(start, stop).astype(np.float64)
    for saved in change.rows:
        assert saved.rows is not None
        for place, row in enumerate(saved.rows):
            if start <= row < stop:
                exact[row - start] = saved.tensor.rows(place, place + 1)[0].astype(np.float64)
    return exact


def _low_rank(change: Change, term: LowRank) -> Rows:
    """scale * b @ a, transposed where the base is."""
    left, right = _factors(change, term)
    right *= term.scale
    return lambda start, stop, base: left[start:stop] @ right


def _dora(change: Change, term: Dora) -> Rows:
    """(m / |W + scale b a|) * (W + scale b a) - W; the norm runs over the inputs of an output."""
    left, right = _factors(change, term)
    right *= term.scale
    magnitude = term.magnitude.read().astype(np.float64).reshape(-1)
    if not change.transposed:

        def by_row(start: int, stop: int, base: Array) -> Array:
            adapted = base + left[start:stop] @ right
            norm = np.linalg.norm(adapted, axis=1)
            added: Array = (magnitude[start:stop] / norm)[:, None] * adapted - base
            return added

        return by_row
    # Stored (in, out): an output is a column, so its norm needs every row first.
    squares = np.zeros_like(magnitude)
    step = rows_per_block(change.shape)
    for first in range(0, change.shape[0], step):
        last = min(change.shape[0], first + step)
        squares += ((base_rows(change, first, last) + left[first:last] @ right) ** 2).sum(axis=0)
    factor = magnitude / np.sqrt(squares)
    return lambda start, stop, base: factor * (base + left[start:stop] @ right) - base


def _scaled(change: Change, term: Scaled) -> Rows:
    vector = term.scale * term.vector.read().astype(np.float64)
    return lambda start, stop, base: vector[start:stop]


def _tuned(change: Change, term: Tuned) -> Rows:
    """What the tuner's own layer makes of the whole parameter, less the parameter."""
    from adaptrix_export.lower.tuned import (
        merged_parameter,
    )  # PyTorch, which the rest does not need

    whole = base_rows(change, 0, change.shape[0])
    exact = merged_parameter(term, whole)
    return lambda start, stop, base: exact[start:stop] - base


_ADDED: dict[type, Callable[[Change, Any], Rows]] = {
    LowRank: _low_rank,
    Dora: _dora,
    Scaled: _scaled,
    Tuned: _tuned,
}


def _factors(change: Change, term: LowRank | Dora) -> tuple[Array, Array]:
    """(left, right) in float64 with left @ right = b @ a as the base stores it."""
    down, up = term.a.read().astype(np.float64), term.b.read().astype(np.float64)
    if change.transposed:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    return up, down


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
