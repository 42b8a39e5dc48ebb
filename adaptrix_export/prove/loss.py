"""What an artifact loses against the float model, on text that nothing was fitted to.

KL(float model || artifact) in nats a token, computed in fp64; the share of positions at which both
pick the same token; and the perplexity of each on the text. Of features: the cosine of each text's
mean vector with the float model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.tasks import FEATURES
from adaptrix_export.oracle.compare import Logits, distance, rounded

Row = Sequence[int]
Answer = Callable[[Row], Logits]


class FloatAnswers:
    """The float model's answers to rows of tokens, in files: memory holds one of them."""

    def __init__(self, rows: Sequence[Row], answer: Answer, folder: Path) -> None:
        self.rows = rows
        self._files = []
        for number, row in enumerate(rows):
            path = folder / f"answer-{number}.npy"
            np.save(path, answer(row))
            self._files.append(path)

    def measure(
        self, answer: Answer, task: str, max_kl: float | None, min_cosine: float | None = None
    ) -> dict[str, Any]:
        """The report's `loss` of an artifact that answers like that."""
        if task == FEATURES:
            return self._features(answer, min_cosine)
        kl = agreed = 0.0
        nll, count, positions = np.zeros(2), 0, 0
        for row, path in zip(self.rows, self._files, strict=True):
            of_float, of_artifact = np.load(path), answer(row)
            apart = distance(of_float, of_artifact)
            kl += apart.mean_kl * len(of_float)
            agreed += apart.top1 * len(of_float)
            positions += len(of_float)
            if len(of_float) == len(row):
                nll += [_nll(of_float, row), _nll(of_artifact, row)]
                count += len(row) - 1
        mean = kl / max(1, positions)
        passed = bool(np.isfinite(mean) and (max_kl is None or mean <= max_kl))
        section: dict[str, Any] = {
            "rows": len(self.rows), "positions": positions, "mean_kl": rounded(mean),
            "top1": rounded(agreed / max(1, positions), 5), "max_kl": max_kl, "passed": passed,
        }  # fmt: skip
        if count:
            section["perplexity"] = {
                name: rounded(float(np.exp(nll[i] / count)), 5)
                for i, name in enumerate(("float", "artifact"))
            }
        return section

    def _features(self, answer: Answer, min_cosine: float | None) -> dict[str, Any]:
        cosines = []
        for row, path in zip(self.rows, self._files, strict=True):
            of_float, of_artifact = (
                np.asarray(a, np.float64).mean(axis=0) for a in (np.load(path), answer(row))
            )
            size = np.linalg.norm(of_float) * np.linalg.norm(of_artifact)
            cosines.append(float(of_float @ of_artifact / max(float(size), 1e-300)))
        least = min(cosines)
        passed = np.isfinite(cosines).all() and (min_cosine is None or least >= min_cosine)
        return {
            "rows": len(cosines), "cosine": rounded(float(np.mean(cosines)), 6),
            "least_cosine": rounded(least, 6), "min_cosine": min_cosine, "passed": bool(passed),
        }  # fmt: skip


def _nll(logits: Logits, row: Row) -> float:
    """Negative log-likelihood of all tokens but the first, summed."""
    x: NDArray[np.float64] = logits[:-1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    chosen = x[np.arange(len(x)), np.asarray(row[1:])]
    return float((np.log(np.exp(x).sum(axis=1)) - chosen).sum())
