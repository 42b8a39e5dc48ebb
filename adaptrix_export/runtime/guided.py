"""Greedy decoding of one row whose next tokens are guessed, several to a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from adaptrix_export.runtime.lookup import Lookup
from adaptrix_export.runtime.running import Run
from adaptrix_export.runtime.sampling import Sampler


def guided(
    run: Run,
    prompt: Sequence[int],
    sampler: Sampler,
    most: int,
    count: int,
    ends: frozenset[int],
) -> Iterator[int]:
    """At most `count` tokens after `prompt`, the last one of `ends` if that came first.

    A step is fed the last token and at most `most` guesses. Its logits choose the token after each
    of them: as long as that is the next guess, the guess was right; the cache forgets the others.
    """
    text = Lookup(prompt)
    guesses: list[int] = []
    fed = list(prompt)
    made = 0
    while made < count:
        before = run.length
        ids = np.array([fed], dtype=np.int64)
        logits = run.step(ids, np.ones((1, before + len(fed)), dtype=np.int64))
        unsure = len(fed) - len(guesses)  # of what was fed, these are certain
        for place, guess in enumerate([*guesses, None]):
            token = sampler.choose(logits[0, unsure - 1 + place])
            made += 1
            text.extend([token])
            yield token
            if token in ends:
                return
            if token != guess:
                break
        run.forget(before + unsure + place)
        guesses = text.guess(max(0, min(most, count - made - 1)))
        fed = [token, *guesses]
