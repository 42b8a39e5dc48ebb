"""How far some models are from the adapted one, over rows of tokens: what fidelity is made of.

Of models with logits: `kl` is KL(adapted || other) in nats a token, `gain` the share of the
adapter's improvement in loss that the other keeps, where the model predicts its next token, and
`agreement` the share of tokens at which both pick the same. An encoder has no distribution over
anything: there `kl` is the mean squared difference of its features from the adapted model's, as a
share of those features' own mean square, and `agreement` the mean cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, cosine_similarity

from adaptrix_export.arch.tasks import FEATURES, GENERATION
from adaptrix_export.oracle.layered import ADAPTED, BASE

POSITIONS = 16  # whose distributions, in fp64, are compared at once


class Divergence:
    """Sums over answers of several models to the same rows. `others` hold BASE, not ADAPTED."""

    def __init__(self, others: Sequence[str], task: str) -> None:
        self.task = task
        self.tokens = 0
        self.answers = 0  # a token each, or a row each where the model classifies rows
        self._predicted = 0
        self._kl = dict.fromkeys(others, 0.0)
        self._agree = dict.fromkeys(others, 0.0)
        self._loss = dict.fromkeys((*others, ADAPTED), 0.0)

    @property
    def measure(self) -> str:
        """What `kl` is, for a report."""
        return "relative squared error of features" if self.task == FEATURES else "KL of logits"

    @property
    def agreement_name(self) -> str:
        return "cosine" if self.task == FEATURES else "top1"

    def add(self, ids: Tensor, answers: Mapping[str, Tensor]) -> None:
        """Answers (rows, tokens, vocabulary or width) to ids (rows, tokens), by model."""
        self.tokens += ids.numel()
        self.answers += answers[ADAPTED][..., 0].numel()
        if self.task == FEATURES:
            self._compare_features(answers)
            return
        for start in range(0, answers[ADAPTED].shape[1], POSITIONS):
            piece = slice(start, start + POSITIONS)
            chances = {w: a[:, piece].double().log_softmax(-1) for w, a in answers.items()}
            self._compare_logits(chances)
            if self.task == GENERATION:
                self._add_loss(chances, ids[:, start + 1 : start + POSITIONS + 1])

    def kl(self, who: str) -> float:
        return rounded(self._kl[who] / self.answers)

    def agreement(self, who: str) -> float:
        return rounded(self._agree[who] / self.answers)

    def retained(self, who: str) -> float:
        """1 - kl / kl of the base; an adapter that changes nothing is retained whole."""
        base = self._kl[BASE]
        return rounded(1 - self._kl[who] / base) if base > 0 else 1.0

    def loss(self) -> dict[str, float]:
        """Nats a token of every model; empty where none predicts its next token."""
        if self.task != GENERATION:
            return {}
        return {who: value / max(1, self._predicted) for who, value in sorted(self._loss.items())}

    def gain(self, who: str) -> float | None:
        """None where the adapter does not improve this text, so that there is no gain to keep."""
        loss = self.loss()
        won = loss[BASE] - loss[ADAPTED] if loss else 0.0
        return rounded((loss[BASE] - loss[who]) / won) if won > 0 else None

    def _add_loss(self, chances: Mapping[str, Tensor], following: Tensor) -> None:
        """Negative log-likelihood of the tokens that follow; a row's last position has none."""
        self._predicted += following.numel()
        for who, log_probs in chances.items():
            of_next_token = log_probs[:, : following.shape[1]].gather(-1, following[..., None])
            self._loss[who] -= float(of_next_token.sum())

    def _compare_logits(self, chances: Mapping[str, Tensor]) -> None:
        adapted = chances[ADAPTED]
        for who in self._kl:
            other = chances[who]
            self._kl[who] += float((adapted.exp() * (adapted - other)).sum())
            self._agree[who] += float((adapted.argmax(-1) == other.argmax(-1)).sum())

    def _compare_features(self, answers: Mapping[str, Tensor]) -> None:
        adapted = answers[ADAPTED].float()
        for who in self._kl:
            other = answers[who].float()
            off = (other - adapted).square().sum(-1) / adapted.square().sum(-1)
            self._kl[who] += float(off.sum())
            self._agree[who] += float(cosine_similarity(other, adapted, dim=-1).sum())


def rounded(value: float) -> float:
    """Six significant digits: more of them are the order of float sums."""
    return float(f"{value:.6g}")
