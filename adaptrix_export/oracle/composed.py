"""The methods of composition once more, in PyTorch: what the oracle holds a composed plan to.

Written from the definitions in `plan/methods.py` alone; no code of the lowering is used, so that
a slip there shows. All in float64 on whole matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adaptrix_export.compat.peft import merge_formulas

EPS = 2.0**-52
EQUAL = 2.0**-40  # values, sums and singular values that are closer than this count as equal
SLACK = 64 * EPS  # rounding errors of a decomposition, by its largest singular value
# Singular values that are closer than this are not told apart: a rank that cuts between them has no
# one meaning, and the replay shall say so.
WORST = 2.0**20
Factors = list[tuple[Any, Any, float]]  # (B, A, scaling)


@dataclass(frozen=True)
class Share:
    """One adapter at one matrix: its live delta (out, in), or (n, 1) of a bias, and its weight.

    `factors` where the delta is that of plain LoRA.
    """

    adapter: str
    weight: float
    delta: Any
    factors: Factors | None = None


@dataclass(frozen=True)
class Made:
    """A composed delta, and how far off rounding alone may have put it (absolute)."""

    delta: Any
    room: float = 0.0


def compose(
    shares: Sequence[Share], options: Mapping[str, Any], name: str, turned: bool, several: bool
) -> Made:
    """The delta (out, in) that a composition of `options` gives; see `Composition.as_dict`.

    `name` is the parameter's, `turned` says that the base stores it (in, out), `several` that the
    plan has more than one adapter.
    """
    method = options["method"]
    vector = shares[0].delta.shape[1] == 1 and name.endswith(".bias")
    if several and method.startswith("peft-") and method not in ("peft-cat", "peft-svd"):
        return Made(_peft(shares, options, name))
    method = method.removeprefix("peft-")
    shares = [share for share in shares if share.weight != 0]
    rank = options["rank"]
    if not shares:
        return Made(0.0)
    if vector and method.endswith("svd"):
        method = "linear" if method == "svd" else method[: -len("_svd")]
    if method in ("cat", "linear") or not several or (vector and method in ("knots", "tsv")):
        return Made(_sum(shares))
    if len(shares) == 1:
        truncates = method.endswith("svd") or (method == "tsv" and rank is not None)
        return _best(_sum(shares), shares, rank) if truncates and not vector else Made(_sum(shares))
    if method == "svd":
        return _best(_sum(shares), shares, rank)
    if method == "knots":
        return _knots(shares, options)
    if method == "tsv":
        return _tsv(shares, rank)
    density = 0.5 if options["density"] is None else options["density"]
    dropped = [_drop(share, method, density, options["seed"], name, turned) for share in shares]
    if "ties" in method:
        largest = [float(s.delta.abs().max()) for s in shares]
        factor = 1 / density if "dare" in method else 1.0
        floors = [EQUAL * v * factor * abs(s.weight) for v, s in zip(largest, shares, strict=True)]
        whole = _vote(torch.stack(dropped), floors, options["election"])
    else:
        whole = torch.stack(dropped).sum(0)
    return _best(whole, [], rank) if method.endswith("_svd") else Made(whole)


def _sum(shares: Sequence[Share]) -> Any:
    return sum(share.weight * share.delta for share in shares)


def _drop(share: Share, method: str, density: float, seed: int, name: str, turned: bool) -> Any:
    """The weighted delta with the values that the method drops set to zero."""
    delta = share.delta
    if "dare" in method:
        keep = kept_values(
            seed, share.adapter, name, delta.T.shape if turned else delta.shape, density
        )
        return share.weight * delta * (keep.T if turned else keep) / density
    if density >= 1:
        return share.weight * delta
    return share.weight * delta * _large(delta, density)


def _large(values: Any, density: float) -> Any:
    """A mask of the largest magnitudes, all of those that equal the last one."""
    sizes = values.abs().flatten()
    count = max(1, int(density * sizes.numel()))
    last = sizes.sort(descending=True).values[count - 1]
    return values.abs() >= last * (1 - EQUAL)


def kept_values(seed: int, adapter: str, name: str, shape: Sequence[int], density: float) -> Any:
    """The mask of a random drop: Philox doubles of sha256 of seed, adapter and name, by lines."""
    digest = hashlib.sha256("\n".join([str(seed), adapter, name]).encode("utf-8")).digest()
    key = sum(byte << (8 * place) for place, byte in enumerate(digest[:16]))
    uniform = np.random.Generator(np.random.Philox(key=key)).random(tuple(shape))
    return torch.from_numpy(uniform) < density


def _vote(values: Any, floors: Sequence[float], election: str) -> Any:
    """Mean of the values whose sign won, value by value; zero where there is no winner."""
    floor = torch.tensor(floors, dtype=torch.float64).view(-1, *[1] * (values.dim() - 1))
    values = torch.where(values.abs() <= floor, 0.0, values)
    sums = values.sum(0)
    winner = sums.sign() * (sums.abs() > EQUAL * values.abs().sum(0))
    if election == "frequency":
        heads = (values > 0).sum(0) - (values < 0).sum(0)
        winner = torch.where(heads == 0, winner, heads.sign().double())
    wins = (values * winner) > 0
    return (values * wins).sum(0) / wins.sum(0).clamp(min=1)


def _best(whole: Any, shares: Sequence[Share], rank: int) -> Made:
    """The best approximation of a rank."""
    u, s, vh = _svd(whole, shares)
    made = u[:, :rank] @ (s[:rank, None] * vh[:rank])
    return Made(made, _room(s, [rank - 1] if rank < len(s) else []))


def _svd(whole: Any, shares: Sequence[Share]) -> tuple[Any, Any, Any]:
    """Of a matrix whose columns lie in those of the shares' deltas: small where all are LoRA."""
    if not shares or any(share.factors is None for share in shares):
        return tuple(torch.linalg.svd(whole, full_matrices=False))
    q = torch.linalg.qr(torch.cat([b for s in shares for b, _, _ in s.factors or ()], 1)).Q
    u, s, vh = torch.linalg.svd(q.T @ whole, full_matrices=False)
    return q @ u, s, vh


def _room(s: Any, cuts: Sequence[int]) -> float:
    """Rounding moves singular vectors by its size over the gap to the next singular value."""
    largest = float(s[0]) if len(s) else 0.0
    spread = 1.0
    for cut in cuts:
        gap = float(s[cut] - s[cut + 1])
        spread = max(spread, 1 + float(s[cut]) / gap if gap > 0 else 1 / EPS)
    return SLACK * largest * min(spread, WORST)


def _above_rounding(s: Any) -> int:
    return int((s > EQUAL * s.max()).sum()) if len(s) else 0


def _knots(shares: Sequence[Share], options: Mapping[str, Any]) -> Made:
    """[D_1 ... D_n] = U S [V_1 ... V_n]^T, then TIES on the V_i."""
    u, s, vh = _svd(torch.cat([x.delta for x in shares], 1), shares)
    count = _above_rounding(s)
    u, s, vh = u[:, :count], s[:count], vh[:count]
    density = 0.5 if options["density"] is None else options["density"]
    parts = vh.chunk(len(shares), 1)
    pruned = [p * _large(p, density) if density < 1 else p for p in parts]
    weighted = torch.stack([x.weight * part for x, part in zip(shares, pruned, strict=True)])
    floors = [
        EQUAL * float(part.abs().max()) * abs(x.weight)
        for x, part in zip(shares, parts, strict=True)
    ]
    merged = _vote(weighted, floors, options["election"])
    return Made((u * s) @ merged, _room(s, range(count - 1)))


def _tsv(shares: Sequence[Share], rank: int | None) -> Made:
    """The strongest singular vectors of each; U and V replaced by the nearest orthogonal ones."""
    each = max(1, (rank or min(shares[0].delta.shape)) // len(shares))
    us, ss, vs, room = [], [], [], 0.0
    for share in shares:
        u, s, vh = _svd(share.delta, [share])
        count = _above_rounding(s)
        own_rank = min(count, each)
        room += abs(share.weight) * _room(s[:count], [own_rank - 1] if own_rank < count else [])
        us.append(u[:, :own_rank])
        ss.append(share.weight * s[:own_rank])
        vs.append(vh[:own_rank].T)
    (left, low), (right, lower) = _nearest(torch.cat(us, 1)), _nearest(torch.cat(vs, 1))
    return Made((left * torch.cat(ss)) @ right.T, room / min(low, lower))


def _nearest(columns: Any) -> tuple[Any, float]:
    """The polar factor, and the smallest singular value that counts."""
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    count = _above_rounding(s)
    return u[:, :count] @ vh[:count], float(s[count - 1])


def _peft(shares: Sequence[Share], options: Mapping[str, Any], name: str) -> Any:
    """PEFT's own merge functions on the live factors, in fp64, with our draw of a random drop."""
    formulas = merge_formulas()
    method, density = options["method"], options["density"]
    density = 0.5 if density is None else density
    combined = []
    for which in (0, 1):
        values: list[Any] = []
        for share in shares:
            (pair,) = share.factors or []
            value: Any = pair[1 - which]
            if "dare" in method and density < 1:
                label = f"{name}.lora_{'AB'[which]}"
                mask = kept_values(options["seed"], share.adapter, label, value.shape, density)
                value = value * mask / density
            elif density < 1 and method in ("peft-ties", "peft-magnitude-prune"):
                chosen = formulas.prune(value.float(), density, method="magnitude") != 0
                value = value * chosen
            values.append(value)
        strength = [s.weight * s.factors[0][2] for s in shares if s.factors]
        sign = [1.0 if which or x >= 0 else -1.0 for x in strength]
        stack = torch.stack(values)
        weights = torch.tensor(
            [g * abs(x) ** 0.5 for g, x in zip(sign, strength, strict=True)], dtype=torch.float64
        )
        weighted = stack * weights.view(-1, 1, 1)
        if "ties" in method:
            mask = formulas.calculate_majority_sign_mask(stack, options["election"])
            combined.append(formulas.disjoint_merge(weighted, mask))
        else:
            combined.append(weighted.sum(0))
    a, b = combined
    return b @ a
