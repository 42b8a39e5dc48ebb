"""Computes the methods of `plan/methods.py` on several deltas of one parameter, in float64.

Works on one matrix at a time: stacked experts are composed one by one. Element-wise methods read
every delta once to find their thresholds, and then compute a block of rows at a time. Methods on
singular vectors use the factors if every delta is a sum of LoRA terms, else the dense matrix.
Memory is that of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.merge.aligned import Factors, dense_svd, knots, thin_svd, truncate, tsv
from adaptrix_export.merge.blocks import Block, Rows, base_rows, rows_per_block
from adaptrix_export.merge.elections import elected, largest_of, random_mask, threshold_of
from adaptrix_export.merge.leaves import leaf_rows
from adaptrix_export.merge.peft_formulas import peft_factors
from adaptrix_export.plan import (
    Array,
    Change,
    Composed,
    LowRank,
    Part,
    leaves,
    low_ranks,
    on_experts,
)
from adaptrix_export.plan.methods import METHODS


@dataclass(frozen=True)
class Share:
    """One adapter's delta of one matrix: its rows as stored, and its factors if it has them.

    `factors` (rows, k) and (k, columns) multiply to the delta.
    """

    adapter: str
    weight: float
    rows: Block
    factors: Factors | None


@dataclass(frozen=True)
class Matrix:
    """One matrix to compose. `turned`: it is stored (in, out)."""

    name: str
    shape: tuple[int, int]
    turned: bool
    shares: tuple[Share, ...]


def composed_rows(change: Change, term: Composed) -> Rows:
    """The composed delta as `merge.py` adds it: rows in the base's layout and shape."""
    if _is_stacked(change, term):
        height = change.shape[1]
        return lambda start, stop, base, so_far: np.stack(
            [_composed(_expert(change, term, e), term)(0, height) for e in range(start, stop)]
        )
    rows = _composed(_matrix(change, term), term)
    return lambda start, stop, base, so_far: rows(start, stop).reshape(base.shape)


def matrices(change: Change, term: Composed) -> Iterator[Matrix]:
    """The matrices that a composition acts on: the parameter, or each of its experts."""
    if _is_stacked(change, term):
        for expert in range(change.shape[0]):
            yield _expert(change, term, expert)
    else:
        yield _matrix(change, term)


def _is_stacked(change: Change, term: Composed) -> bool:
    return len(change.shape) == 3 and any(t.is_stacked for t in leaves((term,)))


def low_rank_factors(change: Change) -> tuple[Array, Array]:
    """(b, a) in float64, (out, k) and (k, in), whose product is the whole change of a weight.

    Exact: for a sum of LoRA terms k is the sum of their ranks; for a composition it is the rank of
    its result. Raises UnsupportedError for a delta that is not low rank.
    """
    factors_of_terms = [_factors_of(change, term) for term in change.terms]
    whole = [factors for factors in factors_of_terms if factors is not None]
    if len(whole) < len(factors_of_terms) or not whole or change.rows:
        raise UnsupportedError(
            change.name, "a delta that is not low rank", "LoRA, or an svd form of a composition",
            "compose with method svd, knots, tsv or one that ends in _svd",
        )  # fmt: skip
    left, right = (
        np.concatenate([f.left for f in whole], axis=1),
        np.concatenate([f.right for f in whole]),
    )
    return (right.T, left.T) if change.transposed else (left, right)


def _factors_of(change: Change, term: object) -> Factors | None:
    """The factors of one term as stored, or None where it has none."""
    if isinstance(term, LowRank):
        return _low_rank(change, Part("", (term,)))
    if not isinstance(term, Composed):
        return None
    if METHODS[term.method].low_rank and len(change.shape) == 2:
        return _low_rank_result(_matrix(change, term), term)
    if term.method == "linear":
        parts = [_low_rank(change, part) for part in term.parts]
        if all(part is not None for part in parts):
            return _side_by_side([p for p in parts if p], [p.weight for p in term.parts])
    return None


def _composed(matrix: Matrix, term: Composed) -> Block:
    if METHODS[term.method].low_rank:
        made = _low_rank_result(matrix, term)
        return lambda start, stop: made.left[start:stop] @ made.right
    return _by_elements(matrix, term)


def _low_rank_result(matrix: Matrix, term: Composed) -> Factors:
    method = METHODS[term.method]
    shares = matrix.shares
    weights = [share.weight for share in shares]
    if method.acts_on == "factors":
        made = peft_factors(term)
        return made.turned if matrix.turned else made
    if method.basis == "common":  # reads D_i laid out (out, in)
        parts = [thin_svd(_out_in_layout(matrix, share)) for share in shares]
        made = knots(parts, weights, term.density or 1.0, term.election)
        return made.turned if matrix.turned else made
    if method.basis == "orthogonal":
        parts = [thin_svd(_stored_delta(matrix, share)) for share in shares]
        return tsv(parts, weights, matrix.shape, term.rank)
    assert term.rank is not None
    factors = [share.factors for share in shares if share.factors is not None]
    if not method.sparsify and len(factors) == len(shares):
        return truncate(thin_svd(_side_by_side(factors, weights)), term.rank)
    return truncate(dense_svd(_by_elements(matrix, term)(0, matrix.shape[0])), term.rank)


def _side_by_side(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """One pair of factors for a weighted sum."""
    left = [w * f.left for f, w in zip(factors, weights, strict=True)]
    return Factors(np.concatenate(left, axis=1), np.concatenate([f.right for f in factors]))


def _stored_delta(matrix: Matrix, share: Share) -> Factors | Array:
    return share.rows(0, matrix.shape[0]) if share.factors is None else share.factors


def _out_in_layout(matrix: Matrix, share: Share) -> Factors | Array:
    factors = _stored_delta(matrix, share)
    if not matrix.turned:
        return factors
    return factors.turned if isinstance(factors, Factors) else factors.T


def _by_elements(matrix: Matrix, term: Composed) -> Block:
    """The methods that look at single values, a block of rows at a time."""
    method = METHODS[term.method]
    density = term.density if term.density is not None else 1.0
    trims = method.sparsify == "magnitude" and density < 1
    thresholds = [threshold_of(_values(matrix, s), density) if trims else 0 for s in matrix.shares]
    scale = 1 / density if method.sparsify == "random" else 1.0
    masks = [
        random_mask(term.seed, s.adapter, matrix.name, matrix.shape, density)
        if method.sparsify == "random" else None
        for s in matrix.shares
    ]  # fmt: skip
    noise = [largest_of(_values(matrix, s)) if method.elects else 0 for s in matrix.shares]

    def rows(start: int, stop: int) -> Array:
        pruned = []
        for share, threshold, mask in zip(matrix.shares, thresholds, masks, strict=True):
            delta = share.rows(start, stop)
            if trims:
                delta = np.where(np.abs(delta) >= threshold, delta, 0.0)
            if mask is not None:
                delta = np.where(mask(start, stop), scale * delta, 0.0)
            pruned.append(share.weight * delta)
        if not method.elects:
            return reduce(np.add, pruned)
        floors = [scale * abs(s.weight) * n for s, n in zip(matrix.shares, noise, strict=True)]
        return elected(pruned, floors, term.election)

    return rows


def _values(matrix: Matrix, share: Share) -> list[Array]:
    """All values of a delta, in blocks."""
    step = rows_per_block(matrix.shape)
    starts = range(0, matrix.shape[0], step)
    return [share.rows(i, min(matrix.shape[0], i + step)) for i in starts]


def _matrix(change: Change, term: Composed) -> Matrix:
    rows = change.shape[0]
    shape = (rows, int(np.prod(change.shape[1:], dtype=np.int64)))
    shares = []
    for part in term.parts:
        factors = _low_rank(change, part)
        block = _product(factors) if factors is not None else _delta_alone(change, part)
        shares.append(Share(part.adapter, part.weight, block, factors))
    return Matrix(term.name, shape, change.transposed, tuple(shares))


def _low_rank(change: Change, part: Part) -> Factors | None:
    """A sum of LoRA terms as one pair of factors, laid out as the base stores the weight."""
    terms = low_ranks(part.terms)
    if len(terms) < len(part.terms):
        return None
    b = np.concatenate([t.scale * t.b.read().astype(np.float64) for t in terms], axis=1)
    a = np.concatenate([t.a.read().astype(np.float64).reshape(t.rank, -1) for t in terms])
    return Factors(b, a).turned if change.transposed else Factors(b, a)


def _product(factors: Factors) -> Block:
    return lambda start, stop: factors.left[start:stop] @ factors.right


def _delta_alone(change: Change, part: Part) -> Block:
    """The delta of one adapter, as its live layer computes it with no other adapter active."""
    added = [leaf_rows(change, term) for term in part.terms]
    reads_base = any(term.reads_base for term in part.terms)

    def rows(start: int, stop: int) -> Array:
        shape = (stop - start, *change.shape[1:])
        base = base_rows(change, start, stop) if reads_base else np.zeros(shape)
        so_far, total = base.copy(), np.zeros(shape)
        for term in added:
            more = term(start, stop, base, so_far)
            total += more
            so_far += more
        return total.reshape(stop - start, -1)

    return rows


def _expert(change: Change, term: Composed, expert: int) -> Matrix:
    """One expert's matrix (out, in) of a parameter that stacks them."""
    shares = []
    for part in term.parts:
        pairs = on_experts(part.terms)
        if len(pairs) < len(part.terms):
            raise UnsupportedError(
                f"{part.adapter}: {change.name}", "another term beside stacked experts",
                "LoRA on the parameter alone", "compose with method cat",
            )  # fmt: skip
        a = [t.a.read().astype(np.float64).reshape(t.experts, -1, t.a.shape[1]) for t in pairs]
        b = [t.b.read().astype(np.float64).reshape(t.b.shape[0], -1, t.experts) for t in pairs]
        left = [t.scale * value[:, :, expert] for t, value in zip(pairs, b, strict=True)]
        factors = Factors(np.concatenate(left, axis=1), np.concatenate([v[expert] for v in a]))
        shares.append(Share(part.adapter, part.weight, _product(factors), factors))
    shape = (change.shape[1], change.shape[2])
    return Matrix(f"{term.name}[{expert}]", shape, False, tuple(shares))
