"""Methods on singular vectors of deltas: low-rank approximation, KnOTS and TSV-Merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptrix_export.merge.elections import elected, largest_of, threshold_of
from adaptrix_export.plan import Array

NOTHING = 2.0**-40  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Factors:
    """A matrix `left @ right`, (rows, k) and (k, columns), in float64."""

    left: Array
    right: Array

    @property
    def turned(self) -> Factors:
        """The transposed matrix."""
        return Factors(np.ascontiguousarray(self.right.T), np.ascontiguousarray(self.left.T))


@dataclass(frozen=True)
class Thin:
    """A singular value decomposition: u (rows, k), s (k,), vt (k, columns), s above rounding."""

    u: Array
    s: Array
    vt: Array

    def first(self, rank: int) -> Thin:
        return Thin(self.u[:, :rank], self.s[:rank], self.vt[:rank])


def dense_svd(matrix: Array) -> Thin:
    return _above_rounding(*np.linalg.svd(matrix, full_matrices=False))


def thin_svd(matrix: Factors | Array) -> Thin:
    """The SVD of a matrix; of a product through the QR of its factors, without the full matrix."""
    if (
        not isinstance(matrix, Factors)
        or min(matrix.left.shape[0], matrix.right.shape[1]) <= (matrix.left.shape[1])
    ):
        return dense_svd(matrix.left @ matrix.right if isinstance(matrix, Factors) else matrix)
    q_left, r_left = np.linalg.qr(matrix.left)
    q_right, r_right = np.linalg.qr(matrix.right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    return _above_rounding(q_left @ u, s, vt @ q_right.T)


def _above_rounding(u: Array, s: Array, vt: Array) -> Thin:
    count = int(np.count_nonzero(s > NOTHING * s.max(initial=0.0)))
    return Thin(u[:, :count], s[:count], vt[:count])


def truncate(thin: Thin, rank: int) -> Factors:
    """The best approximation of at most `rank` (Eckart and Young)."""
    leading = thin.first(rank)
    return Factors(leading.u * leading.s, leading.vt)


def knots(
    parts: Sequence[Thin], weights: Sequence[float], density: float, election: str
) -> Factors:
    """KnOTS with TIES, https://arxiv.org/abs/2410.19735, for D_i laid out (out, in).

    [D_1 ... D_n] = U S [V_1 ... V_n]^T; the w_i V_i are trimmed and merged as TIES does, and the
    result is U S V^T. The decomposition is that of [U_1 S_1 ... U_n S_n], times the V_i^T.
    """
    joint = dense_svd(np.concatenate([p.u * p.s for p in parts], axis=1))
    edges = np.cumsum([0, *(len(p.s) for p in parts)])
    values, floors = [], []
    for part, weight, start, stop in zip(parts, weights, edges, edges[1:], strict=False):
        right = joint.vt[:, start:stop] @ part.vt
        floor = largest_of([right])
        if density < 1:
            right = np.where(np.abs(right) >= threshold_of([right], density), right, 0.0)
        values.append(weight * right)
        floors.append(abs(weight) * floor)
    return Factors(joint.u * joint.s, elected(values, floors, election))


def tsv(
    parts: Sequence[Thin], weights: Sequence[float], shape: tuple[int, int], rank: int | None
) -> Factors:
    """TSV-Merge, https://arxiv.org/abs/2412.00081: U' S V'^T, where U' and V' are the orthogonal
    matrices nearest to the concatenated singular vectors of all parts.

    Each of n parts contributes its first `rank` / n components; without a rank, min(shape) / n,
    which is all of a LoRA. S are the singular values times the weights.
    """
    each = max(1, (min(shape) if rank is None else rank) // len(parts))
    leading = [part.first(each) for part in parts]
    u = _orthogonal(np.concatenate([p.u for p in leading], axis=1))
    v = _orthogonal(np.concatenate([p.vt.T for p in leading], axis=1))
    s = np.concatenate([w * p.s for p, w in zip(leading, weights, strict=True)])
    return Factors(u * s, np.ascontiguousarray(v.T))


def _orthogonal(columns: Array) -> Array:
    """The orthogonal polar factor; for dependent columns, within the space that they span."""
    thin = dense_svd(columns)
    return thin.u @ thin.vt
