"""How much adapters get in each other's way, before anything is composed.

For two deltas X and Y of one parameter, each as it acts alone and with weight 1:

| field | meaning |
|---|---|
| cosine | <X, Y> / (|X| |Y|): 1 the same direction, 0 unrelated, -1 opposed |
| sign_disagreement | share of the values that both change, and in different directions |
| cancelled | 1 - sum |x + y| / sum (|x| + |y|): what is lost when the two are added |
| overlap_out, overlap_in | mean squared cosine of the principal angles between their column \
(output) and row (input) spaces: 1 if one contains the other, about r / n for unrelated ones |
| energy | of each adapter: |D|^2 over that of all adapters at this parameter |

The one number of a pair, `conflict`, is `cancelled` averaged over all parameters that either
changes, weighted by |X|^2 + |Y|^2: 0 where nothing cancels, as for adapters of different sites;
1 where everything does. Unrelated adapters of one size at the same sites have about 0.29
(1 - 1/sqrt 2), so what lies above that is opposed.

Cosine, energy and overlaps come from the factors of LoRA, without a dense matrix; signs need the
values, a block of rows at a time. Overlaps of other tuners' deltas are not measured (None).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from adaptrix_export.errors import RecipeError
from adaptrix_export.load import open_adapter
from adaptrix_export.load.base_weights import AUTO, open_bases
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.mismatch import fitted
from adaptrix_export.merge.aligned import Factors, thin_svd
from adaptrix_export.merge.blocks import rows_per_block
from adaptrix_export.merge.composed import Matrix, Share, matrices
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.plan import Array, Composed, Part, Plan, leaves
from adaptrix_export.plan.shares import shares_of
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.recipe.sections import default_name

DIGITS = 6
Pair = tuple[str, str]


@dataclass
class Sums:
    """What is added up over the matrices of a parameter, or over all parameters."""

    energy: dict[str, float] = field(default_factory=dict)  # adapter -> |D|^2
    inner: dict[Pair, float] = field(default_factory=dict)  # <X, Y>
    sizes: dict[Pair, float] = field(default_factory=dict)  # sum of |x| + |y|
    summed: dict[Pair, float] = field(default_factory=dict)  # sum of |x + y|
    both: dict[Pair, float] = field(default_factory=dict)  # values that both change
    against: dict[Pair, float] = field(default_factory=dict)  # and in different directions
    overlaps: dict[Pair, list[tuple[float, float] | None]] = field(default_factory=dict)

    def cosine(self, pair: Pair) -> float:
        norm = sqrt(self.energy[pair[0]] * self.energy[pair[1]])
        return self.inner.get(pair, 0.0) / norm if norm else 0.0

    def cancelled(self, pair: Pair) -> float:
        size = self.sizes.get(pair, 0.0)
        return max(0.0, 1 - self.summed[pair] / size) if size else 0.0

    def disagreement(self, pair: Pair) -> float:
        count = self.both.get(pair, 0)
        return self.against[pair] / count if count else 0.0

    def overlap(self, pair: Pair) -> tuple[float | None, float | None]:
        known = [o for o in self.overlaps.get(pair, []) if o is not None]
        if not known or len(known) < len(self.overlaps[pair]):
            return None, None
        return sum(o[0] for o in known) / len(known), sum(o[1] for o in known) / len(known)


def conflicts(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """The report of the module's docstring for every pair of adapters of an uncomposed plan.

    `adapters`: name, norm of all that it adds. `pairs`: the pooled numbers, worst conflict first.
    `sites`: the numbers of each parameter that two or more adapters change. Whole tensors that an
    adapter ships are no deltas; they are not part of it.
    """
    shares_by_name = shares_of(plan)
    changes = plan.changes()
    names = [adapter.name for adapter in plan.adapters]
    pairs = list(combinations(names, 2))
    by_site: dict[str, Sums] = {}
    with (
        (progress or Silent()).stage("conflicts", len(shares_by_name), "parameters") as advance,
        layers_freed(),
        threadpool_limits(limits=1, user_api="blas"),
    ):
        for name, shares in sorted(shares_by_name.items()):
            parts = tuple(Part(a.name, tuple(leaves(d.terms))) for a, d in shares)
            by_site[name] = _sums_over(matrices(changes[name], Composed("linear", name, parts)))
            advance(1)
    energy = {n: sum(s.energy.get(n, 0.0) for s in by_site.values()) for n in names}
    pooled = [_pooled(pair, by_site, energy) for pair in pairs]
    return {
        "adapters": [{"name": n, "norm": _short(sqrt(energy[n]))} for n in names],
        "pairs": sorted(pooled, key=lambda p: (-p["conflict"], p["adapters"])),
        "sites": [_site(name, sums) for name, sums in by_site.items() if len(sums.energy) > 1],
    }


def conflicts_between(
    base: str, adapters: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """The report for adapters by their specs, on a base; two or more.

    Raises what opening raises, AdapterError for one that does not fit the base.
    """
    if len(adapters) < 2:
        raise RecipeError("adapters", f"{len(adapters)} of them", "two or more", "name another")
    opened, _ = open_bases(base, AUTO, None, None, task="auto", adapters=list(adapters))
    names = [default_name(spec) for spec in adapters]
    twice = len(set(names)) < len(names)
    named = [f"{name}-{i}" if twice else name for i, name in enumerate(names, 1)]
    loaded = tuple(open_adapter(s, opened, n) for s, n in zip(adapters, named, strict=True))
    plan = verify(fitted(Plan(opened, loaded), "error"))
    check_finite(plan, progress or Silent())
    return conflicts(plan, progress)


def _sums_over(matrices_of_site: Iterable[Matrix]) -> Sums:
    sums = Sums()
    for matrix in matrices_of_site:
        _add_products(sums, matrix)
        _add_signs(sums, matrix)
    return sums


def _add_products(sums: Sums, matrix: Matrix) -> None:
    """Energies, inner products and overlaps; from factors where there are any."""
    thin = {
        s.adapter: thin_svd(s.factors) if s.factors is not None else None for s in matrix.shares
    }
    for share in matrix.shares:
        own = _product(share, share, matrix)
        sums.energy[share.adapter] = sums.energy.get(share.adapter, 0.0) + own
    for one, other in combinations(matrix.shares, 2):
        pair = (one.adapter, other.adapter)
        sums.inner[pair] = sums.inner.get(pair, 0.0) + _product(one, other, matrix)
        x, y = thin[one.adapter], thin[other.adapter]
        overlap = None
        if x is not None and y is not None:
            sides = (_overlap(x.u, y.u), _overlap(x.vt.T, y.vt.T))
            overlap = sides[::-1] if matrix.turned else sides
        sums.overlaps.setdefault(pair, []).append(overlap)


def _product(one: Share, other: Share, matrix: Matrix) -> float:
    """<X, Y>; for X = l r and Y = m s it is the sum of (l^T m) * (r s^T), of the ranks' size."""
    if isinstance(one.factors, Factors) and isinstance(other.factors, Factors):
        left = one.factors.left.T @ other.factors.left
        return float((left * (one.factors.right @ other.factors.right.T)).sum())
    return sum(float((one.rows(*b) * other.rows(*b)).sum()) for b in _blocks(matrix))


def _overlap(one: Array, other: Array) -> float:
    """Mean squared cosine of the principal angles of two spaces, given orthonormal columns."""
    smaller = min(one.shape[1], other.shape[1])
    return float((np.square(one.T @ other)).sum()) / smaller if smaller else 0.0


def _add_signs(sums: Sums, matrix: Matrix) -> None:
    if len(matrix.shares) < 2:
        return
    for start, stop in _blocks(matrix):
        rows = [(s.adapter, s.rows(start, stop)) for s in matrix.shares]
        for (one, x), (other, y) in combinations(rows, 2):
            pair, product = (one, other), np.sign(x) * np.sign(y)
            for total, more in (
                (sums.sizes, float(np.abs(x).sum() + np.abs(y).sum())),
                (sums.summed, float(np.abs(x + y).sum())),
                (sums.both, int(np.count_nonzero(product))),
                (sums.against, int(np.count_nonzero(product < 0))),
            ):
                total[pair] = total.get(pair, 0) + more


def _blocks(matrix: Matrix) -> list[tuple[int, int]]:
    step = rows_per_block(matrix.shape)
    rows = matrix.shape[0]
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _pooled(pair: Pair, by_site: Mapping[str, Sums], energy: Mapping[str, float]) -> dict[str, Any]:
    """One pair over all parameters."""
    shared = {n: s for n, s in by_site.items() if pair in s.inner}
    weight = {n: sum(s.energy[a] for a in pair) for n, s in shared.items()}
    whole = energy[pair[0]] + energy[pair[1]]
    inner = sum(s.inner[pair] for s in shared.values())
    norm = sqrt(energy[pair[0]] * energy[pair[1]])
    both = sum(s.both[pair] for s in shared.values())
    conflict = sum(weight[n] * s.cancelled(pair) for n, s in shared.items())
    return {
        "adapters": list(pair),
        "conflict": _short(conflict / whole if whole else 0.0),
        "cosine": _short(inner / norm if norm else 0.0),
        "sign_disagreement": _short(
            sum(s.against[pair] for s in shared.values()) / both if both else 0.0
        ),
        "overlap_out": _average([s.overlap(pair)[0] for s in shared.values()], weight.values()),
        "overlap_in": _average([s.overlap(pair)[1] for s in shared.values()], weight.values()),
        "shared_sites": len(shared),
        "shared_energy": _short(sum(weight.values()) / whole if whole else 0.0),
    }


def _average(values: Sequence[float | None], weights: Any) -> float | None:
    """Weighted by energy; None if any is."""
    total = sum(weights)
    if not total or any(value is None for value in values):
        return None
    return _short(sum(w * (v or 0.0) for v, w in zip(values, weights, strict=True)) / total)


def _site(name: str, sums: Sums) -> dict[str, Any]:
    whole = sum(sums.energy.values())
    pairs = []
    for pair in sums.inner:
        out, into = sums.overlap(pair)
        pairs.append(
            {
                "adapters": list(pair),
                "cosine": _short(sums.cosine(pair)),
                "sign_disagreement": _short(sums.disagreement(pair)),
                "cancelled": _short(sums.cancelled(pair)),
                "overlap_out": None if out is None else _short(out),
                "overlap_in": None if into is None else _short(into),
            }
        )
    shares = {n: _short(e / whole if whole else 0.0) for n, e in sums.energy.items()}
    return {"site": name, "energy": shares, "pairs": pairs}


def _short(value: float) -> float:
    """Six digits: what two machines agree on; no negative zero."""
    return float(f"{value:.{DIGITS}g}") + 0.0
