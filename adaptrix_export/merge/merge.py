"""Merged values of one tensor, a block of rows at a time.

The sum is taken in float64 and rounded once, to the dtype that is written. An fp32 sum rounded to
bf16 would differ from the exact result near ties; and a block at a time keeps memory bounded by
the block, whatever the size of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.plan import (
    Array,
    Change,
    Composed,
    Dora,
    Experts,
    LowRank,
    Scaled,
    Tensor,
    Term,
    Tuned,
)

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


# (start, stop, rows of the base, the same with the terms before this one added) -> what to add
Rows = Callable[[int, int, Array, Array], Array]


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
    return _ADDED[type(term)](change, term)


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
    """scale * b @ a, transposed where the base is, in the shape of a convolution's kernel."""
    left, right = _factors(change, term)
    right *= term.scale
    return lambda start, stop, base, so_far: (left[start:stop] @ right).reshape(base.shape)


def _dora(change: Change, term: Dora) -> Rows:
    """m / |W + scale b a| * (V + scale b a) - V; the norm runs over the inputs of an output.

    V is the base W with the terms of the adapters before this one: PEFT's live layer scales what
    it has so far, and takes the norm of the base with this adapter alone.
    """
    left, right = _factors(change, term)
    right *= term.scale
    magnitude = term.magnitude.read().astype(np.float64).reshape(-1)
    if not change.transposed:

        def by_row(start: int, stop: int, base: Array, so_far: Array) -> Array:
            delta = left[start:stop] @ right
            factor = magnitude[start:stop] / np.linalg.norm(base + delta, axis=1)
            added: Array = factor[:, None] * (so_far + delta) - so_far
            return added

        return by_row
    # Stored (in, out): an output is a column, so its norm needs every row first.
    squares = np.zeros_like(magnitude)
    step = rows_per_block(change.shape)
    for first in range(0, change.shape[0], step):
        last = min(change.shape[0], first + step)
        squares += ((base_rows(change, first, last) + left[first:last] @ right) ** 2).sum(axis=0)
    factor = magnitude / np.sqrt(squares)

    def by_column(start: int, stop: int, base: Array, so_far: Array) -> Array:
        added: Array = factor * (so_far + left[start:stop] @ right) - so_far
        return added

    return by_column


def _scaled(change: Change, term: Scaled) -> Rows:
    vector = term.scale * term.vector.read().astype(np.float64)
    return lambda start, stop, base, so_far: vector[start:stop]


def _experts(change: Change, term: Experts) -> Rows:
    """scale * b_e @ a_e, an expert at a time; a parameter of two dimensions is one of its rows."""
    a, b = term.a.read().astype(np.float64), term.b.read().astype(np.float64)
    a = term.scale * a.reshape(term.experts, -1, a.shape[1])  # (experts, r, in)
    b = b.reshape(b.shape[0], -1, term.experts)  # (out, r, experts)
    if len(change.shape) == 2:
        return lambda start, stop, base, so_far: b[start:stop, :, 0] @ a[0]

    def by_expert(start: int, stop: int, base: Array, so_far: Array) -> Array:
        added = np.stack([b[:, :, e] @ a[e] for e in range(start, stop)])
        return added.swapaxes(1, 2) if term.turned else added

    return by_expert


def _tuned(change: Change, term: Tuned) -> Rows:
    """What the tuner's own layer makes of the whole parameter, less the parameter."""
    from adaptrix_export.merge.tuned import merged_parameter  # needs PyTorch; the rest does not

    whole = base_rows(change, 0, change.shape[0])
    exact = merged_parameter(term, whole)
    return lambda start, stop, base, so_far: exact[start:stop] - base


def _composed(change: Change, term: Composed) -> Rows:
    from adaptrix_export.merge.composed import composed_rows  # evaluates terms through this module

    return composed_rows(change, term)


_ADDED: dict[type, Callable[[Change, Any], Rows]] = {
    LowRank: _low_rank,
    Dora: _dora,
    Scaled: _scaled,
    Experts: _experts,
    Tuned: _tuned,
    Composed: _composed,
}


def _factors(change: Change, term: LowRank | Dora) -> tuple[Array, Array]:
    """(left, right) in float64 with left @ right = b @ a as the base stores it."""
    down, up = term.a.read().astype(np.float64), term.b.read().astype(np.float64)
    if change.transposed:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    return up, down


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
