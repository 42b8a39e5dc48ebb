"""The norm of a delta relative to the weight it changes, computed without the full delta."""

from __future__ import annotations

from math import sqrt

import numpy as np

from adaptrix_export.load.files.finite import blocks
from adaptrix_export.plan import Change, Delta, Tensor

# |delta| / |W| in the Frobenius norm; recipes/adapters/pydoc measures 0.013 to 0.057. A delta as
# large as the weight has replaced it: a wrong alpha, or a training that diverged. Below 1e-6 it is
# lost in the rounding of a bf16 weight (2^-9) and nearly so in that of fp32 (2^-24).
LARGEST = 1.0
SMALLEST = 1e-6


def delta_norm(delta: Delta) -> float | None:
    """Frobenius norm of the sum of low-rank terms; of DoRA's, before its norm; None for others.

    For D = B A, |D|^2 = trace(A^T B^T B A) = sum of (B^T B) * (A A^T) elementwise: two matrices of
    the rank's size. Several terms are one with their factors side by side.
    """
    products = [product for term in delta.terms if (product := term.product)]
    if len(products) < len(delta.terms) or not products:
        return None
    a = np.concatenate([a.read().astype(np.float64) for a, _, _ in products], axis=0)
    b = np.concatenate([s * b.read().astype(np.float64) for _, b, s in products], axis=1)
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return sqrt(max(squared, 0.0))


def change_norm(change: Change, start: Tensor | None) -> float:
    """Frobenius norm of the change of one tensor, exact for every kind of change.

    `start` is the base's tensor, None for one that only the adapter has. The norm of LoRA terms is
    computed from their factors; all others are merged, in blocks of rows, and compared with
    `start`.
    """
    plain = change.source is start and not change.rows
    if plain and change.terms and all(term.is_plain for term in change.terms):
        norm = delta_norm(Delta(change.site, change.terms))
        assert norm is not None
        return norm
    from adaptrix_export.merge.merge import merged_blocks

    # Of a resized vocabulary, the rows that both have are compared; new rows count in full.
    known = start.shape[0] if start is not None and start.shape else 0
    squared, first = 0.0, 0
    for values in merged_blocks(change, "F64"):
        stop = min(known, first + len(values))
        if start is not None and first < stop:
            values[: stop - first] -= start.rows(first, stop)
        squared += float((values**2).sum())
        first += len(values)
    return sqrt(squared)


def tensor_norm(tensor: Tensor) -> float:
    """Frobenius norm, read some rows at a time."""
    return sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in blocks(tensor)))
