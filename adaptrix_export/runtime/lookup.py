"""Guesses of what comes next, taken from the text so far: prompt lookup decoding.

Answers repeat their prompt, and themselves: code, quotations, lists. Where the last tokens have
stood before, what followed them is a guess; the model reads it in one step with the token before
it, and what it would not have said itself is thrown away. The tokens are those of greedy decoding.
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (3, 2)  # of what must have stood before, the longest first


class Lookup:
    """The text so far, and where each short run of its tokens last went on."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._went_on: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in ids:
            place = len(self._ids)
            for size in SIZES:
                if place >= size:
                    self._went_on[tuple(self._ids[-size:])] = place
            self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where the text says nothing."""
        for size in SIZES:
            place = self._went_on.get(tuple(self._ids[-size:]))
            if place is not None:
                return self._ids[place : place + most]
        return []
