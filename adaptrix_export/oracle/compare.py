"""Numbers that say how far two sets of logits are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.job import Tolerance

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]  # token ids, masks, positions: (rows, tokens)


@dataclass(frozen=True)
class Distance:
    """Over all positions: largest difference, mean KL(reference || artifact), argmax agreement."""

    finite: bool
    max_abs: float
    mean_kl: float
    top1: float

    def within(self, tolerance: Tolerance) -> bool:
        return (
            self.finite
            and self.max_abs <= tolerance.max_abs
            and (tolerance.mean_kl is None or self.mean_kl <= tolerance.mean_kl)
            and (tolerance.top1 is None or self.top1 >= tolerance.top1)
        )


def distance(reference: Logits, artifact: Logits) -> Distance:
    """Both (positions, vocabulary). KL in nats a token, computed in fp64.

    Anything not finite on either side makes the whole comparison not finite; the other numbers
    are then meaningless and left at infinity.
    """
    if reference.shape != artifact.shape:
        raise ParityError(
            "logits",
            f"the artifact returned shape {artifact.shape}",
            f"{reference.shape} as the reference returns",
        )
    if not (np.isfinite(reference).all() and np.isfinite(artifact).all()):
        return Distance(False, np.inf, np.inf, 0.0)
    largest, divergence, agreed = 0.0, 0.0, 0
    for row, other in zip(reference, artifact, strict=True):  # a row at a time bounds the fp64
        a, b = row.astype(np.float64), other.astype(np.float64)
        largest = max(largest, float(np.abs(a - b).max()))
        divergence += _kl(a, b)
        agreed += int(a.argmax() == b.argmax())
    count = max(1, len(reference))
    return Distance(True, largest, divergence / count, agreed / count)


def _kl(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    # rounding can leave a divergence of zero at -1e-17
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def rounded(value: float, digits: int = 3) -> float | None:
    """For a report: few digits, so that two runs print the same; None where there is no number."""
    return float(f"{value:.{digits - 1}e}") if np.isfinite(value) else None
