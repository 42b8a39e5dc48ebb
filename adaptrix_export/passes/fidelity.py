"""What a redistribution kept of the adapter, measured on text that no strategy has seen.

Of a model with logits: `kl` is KL(adapted || redistributed), `kl_base` KL(adapted || base), both in
nats a token; `retained` is 1 - kl / kl_base; `gain` is the share of the adapter's improvement in
loss that is kept, where the model predicts its next token; `top1` the share of tokens at which both
pick the same. An encoder has no distribution over anything: there `kl` is the mean squared
difference of its features from the adapted model's, as a share of those features' own mean square
(`measure` says so), and `cosine` takes the place of `top1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrix_export.load.task import FEATURES, GENERATION
from adaptrix_export.passes.live import ADAPTED, STUDENT, Live

if TYPE_CHECKING:
    from adaptrix_export.passes.calibration import Ids
    from adaptrix_export.progress import Progress

ROWS = 1  # at a time: three sets of logits, each tokens times vocabulary
POSITIONS = 64  # whose distributions are compared at once


@dataclass
class _Totals:
    """Sums over tokens; `residual[l]` is |difference|^2 over |adapted|^2, token by token."""

    tokens: int = 0
    answers: int = 0  # a token each, or a row each where the model classifies rows
    predicted: int = 0
    kl: dict[str, float] = field(default_factory=lambda: {"base": 0.0, "student": 0.0})
    agree: dict[str, float] = field(default_factory=lambda: {"base": 0.0, "student": 0.0})
    loss: dict[str, float] = field(
        default_factory=lambda: {"base": 0.0, "student": 0.0, "adapted": 0.0}
    )
    residual: dict[str, list[float]] = field(default_factory=dict)


def measure(live: Live, ids: Ids, task: str, progress: Progress) -> dict[str, Any]:
    """The figures above for the student as it is now attached, and the residual after each layer.

    `residual_before` and `residual_after` are root mean squares over tokens of
    |h - adapted h| / |adapted h|, for the base and for the redistributed adapter.
    """
    total = _Totals(residual={who: [0.0] * len(live.layers) for who in ("base", "student")})
    with progress.stage("fidelity", len(ids), "rows") as advance, torch.no_grad():
        for start in range(0, len(ids), ROWS):
            row = torch.from_numpy(ids[start : start + ROWS]).to(live.device)
            _add_row(live, row, task, total)
            advance(len(row))
    return _figures(total, task)


def _add_row(live: Live, row: Tensor, task: str, total: _Totals) -> None:
    answer, bare = live.base_answer(row)
    answers = {"base": answer}
    adapted = student = live.enter(row)
    wanted = []
    for number in range(len(live.layers)):
        adapted = live.layer(ADAPTED, number, adapted)
        wanted.append(adapted)
    for number in range(len(live.layers)):
        student = live.layer(STUDENT, number, student)
        size = wanted[number].square().sum(-1)
        for who, hidden in (("base", bare[number]), ("student", student)):
            off = (hidden - wanted[number]).square().sum(-1) / size
            total.residual[who][number] += float(off.sum())
    answers["student"] = live.leave(row, student)
    answers["adapted"] = live.leave(row, adapted)
    total.tokens += row.numel()
    total.answers += answers["adapted"][..., 0].numel()
    if task == FEATURES:
        _compare_features(answers, total)
        return
    for start in range(0, answers["adapted"].shape[1], POSITIONS):
        piece = slice(start, start + POSITIONS)
        chances = {who: found[:, piece].double().log_softmax(-1) for who, found in answers.items()}
        _compare_logits(chances, total)
        if task == GENERATION:
            _add_loss(chances, row[:, start + 1 : start + POSITIONS + 1], total)


def _add_loss(chances: Mapping[str, Tensor], following: Tensor, total: _Totals) -> None:
    """Negative log-likelihood of the tokens that follow; the last position of a row has none."""
    total.predicted += following.numel()
    for who, found in chances.items():
        seen = found[:, : following.shape[1]].gather(-1, following[..., None])
        total.loss[who] -= float(seen.sum())


def _compare_logits(chances: Mapping[str, Tensor], total: _Totals) -> None:
    wanted = chances["adapted"]
    for who in ("base", "student"):
        found = chances[who]
        total.kl[who] += float((wanted.exp() * (wanted - found)).sum())
        total.agree[who] += float((wanted.argmax(-1) == found.argmax(-1)).sum())


def _compare_features(answers: Mapping[str, Tensor], total: _Totals) -> None:
    wanted = answers["adapted"].float()
    for who in ("base", "student"):
        found = answers[who].float()
        off = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        total.kl[who] += float(off.sum())
        total.agree[who] += float(torch.cosine_similarity(found, wanted, dim=-1).sum())


def _figures(total: _Totals, task: str) -> dict[str, Any]:
    count = total.answers
    kl, kl_base = total.kl["student"] / count, total.kl["base"] / count
    agreement = "cosine" if task == FEATURES else "top1"
    found: dict[str, Any] = {
        "measure": "relative squared error of features" if task == FEATURES else "KL of logits",
        "tokens": total.tokens,
        "kl": _rounded(kl),
        "kl_base": _rounded(kl_base),
        "retained": retained(kl, kl_base),
        agreement: _rounded(total.agree["student"] / count),
        f"{agreement}_base": _rounded(total.agree["base"] / count),
    }
    if task == GENERATION:
        loss = {who: value / max(1, total.predicted) for who, value in total.loss.items()}
        won = loss["base"] - loss["adapted"]
        found["loss"] = {who: _rounded(value) for who, value in sorted(loss.items())}
        # an adapter that does not improve this text has no gain to keep
        found["gain"] = _rounded((loss["base"] - loss["student"]) / won) if won > 0 else None
    for name, who in (("residual_before", "base"), ("residual_after", "student")):
        found[name] = [_rounded((value / total.tokens) ** 0.5) for value in total.residual[who]]
    return found


def retained(kl: float, kl_base: float) -> float:
    """1 - kl / kl_base; an adapter that changes nothing is retained whole."""
    return _rounded(1 - kl / kl_base) if kl_base > 0 else 1.0


def _rounded(value: float) -> float:
    """Six significant digits: more of them are the order of float sums."""
    return float(f"{value:.6g}")
