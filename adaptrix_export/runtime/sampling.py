"""How the next token is chosen from its logits: greedily, or drawn.

The order of the steps and their definitions are those of transformers' `generate`: repetition
penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.requests import number, whole_number

Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampling:
    """Options of one request. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens.

    `repetition_penalty` > 1 makes tokens of the prompt and of the answer less likely; it holds
    for greedy choice, too. The same `seed` gives the same tokens; None draws a new one.
    `lookup` > 0: so many tokens at most are guessed from the text so far, and checked in one step;
    for one prompt, chosen greedily, whose tokens it does not change (see `lookup.py`).
    Raises SourceError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    lookup: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            number(name, getattr(self, name))
        whole_number("top_k", self.top_k)
        whole_number("lookup", self.lookup)
        if self.seed is not None:
            whole_number("seed", self.seed)
        for name, value, right, expected in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty,
             self.repetition_penalty > 0, "above 0"),
            ("lookup", self.lookup,
             not self.lookup or (self.temperature == 0 and self.repetition_penalty == 1),
             "0, or a temperature of 0 and a repetition_penalty of 1"),
        ):  # fmt: skip
            if not right:
                raise SourceError(name, repr(value), expected)


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one row. Row `row` of a seeded batch draws what it always draws."""

    def __init__(self, sampling: Sampling, seen: Iterable[int], row: int = 0) -> None:
        self._options = sampling
        self._seen = set(seen) if sampling.repetition_penalty != 1 else set()
        seed = None if sampling.seed is None else [sampling.seed, row]
        self._random = np.random.default_rng(seed)

    def choose(self, logits: Scores) -> int:
        """The next token, from its logits (vocab,). Raises SourceError where none is finite."""
        options = self._options
        largest = logits[logits.argmax()]  # NaN counts as the largest
        if not np.isfinite(largest):
            raise SourceError(
                "logits", f"{largest}", "finite numbers", "use smaller weights for the adapters"
            )
        scores = logits
        if options.repetition_penalty != 1:
            scores = penalized(scores, self._seen, options.repetition_penalty)
        if options.temperature == 0:
            token = int(scores.argmax())
        else:
            candidates: Scores = scores.astype(np.float64) / options.temperature
            candidates = nucleus(strongest(candidates, options.top_k), options.top_p)
            token = int(self._random.choice(len(candidates), p=probabilities(candidates)))
        if options.repetition_penalty != 1:
            self._seen.add(token)
        return token


def penalized(scores: Scores, seen: set[int], penalty: float) -> Scores:
    """Scores of seen tokens made smaller: divided where positive, multiplied where negative.

    CTRL, https://arxiv.org/abs/1909.05858.
    """
    changed = scores.copy()
    ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
    ids = ids[ids < len(scores)]
    changed[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
    return changed


def strongest(scores: Scores, count: int) -> Scores:
    """All but the `count` largest scores at minus infinity; ties with the last one stay."""
    if not 0 < count < len(scores):
        return scores
    last = np.partition(scores, -count)[-count]
    return np.where(scores < last, -np.inf, scores)


def nucleus(scores: Scores, share: float) -> Scores:
    """All but the likeliest tokens that together hold `share` of the probability at -inf.

    https://arxiv.org/abs/1904.09751; the likeliest token always stays.
    """
    if share >= 1:
        return scores
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(probabilities(scores[order])) <= 1 - share
    below[-1] = False
    remaining = scores.copy()
    remaining[order[below]] = -np.inf
    return remaining


def probabilities(scores: Scores) -> Scores:
    """Softmax; -inf becomes 0."""
    values = np.exp(scores - scores.max())
    result: Scores = values / values.sum()
    return result
