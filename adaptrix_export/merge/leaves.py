"""The delta of each kind of term, by rows, in float64: one function for each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adaptrix_export.merge.blocks import Rows, base_rows, rows_per_block
from adaptrix_export.plan import Array, Change, Dora, Experts, Leaf, LowRank, Scaled, Tuned


def leaf_rows(change: Change, term: Leaf) -> Rows:
    """The delta of one term, by rows in the base's layout."""
    return _ADDED[type(term)](change, term)


def _low_rank(change: Change, term: LowRank) -> Rows:
    """scale * b @ a, transposed where the base is, in the shape of a convolution's kernel."""
    left, right = scaled_factors(change, term)
    return lambda start, stop, base, so_far: (left[start:stop] @ right).reshape(base.shape)


def scaled_factors(change: Change, term: LowRank) -> tuple[Array, Array]:
    """(left, right) in float64 with left @ right = scale * b @ a as the base stores it."""
    left, right = _factors(change, term)
    right *= term.scale
    return left, right


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
    """scale * b_e @ a_e for each expert; a parameter of two dimensions counts as one expert."""
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
    """The parameter as merged by the tuner's own layer, minus the base's parameter."""
    from adaptrix_export.merge.tuned import merged_parameter  # needs PyTorch; the rest does not

    whole = base_rows(change, 0, change.shape[0])
    exact = merged_parameter(term, whole)
    return lambda start, stop, base, so_far: exact[start:stop] - base


def _factors(change: Change, term: LowRank | Dora) -> tuple[Array, Array]:
    """(left, right) in float64 with left @ right = b @ a as the base stores it."""
    down, up = term.a.read().astype(np.float64), term.b.read().astype(np.float64)
    if change.transposed:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    return up, down


_ADDED: dict[type, Callable[[Change, Any], Rows]] = {
    LowRank: _low_rank,
    Dora: _dora,
    Scaled: _scaled,
    Experts: _experts,
    Tuned: _tuned,
}
