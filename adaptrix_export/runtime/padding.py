"""Rows of different lengths as one batch, padded on the left or on the right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.graph import Ids

SIDES = ("left", "right")


def padded(rows: Sequence[Sequence[int]], side: str, more: int) -> tuple[Ids, Ids, Ids]:
    """(ids, mask, place of each row's last token) of the rows at one length.

    `ids` is (batch, longest), pads are token 0; `mask` is (batch, longest + more), with ones
    behind the prompt for the tokens to come. Raises SourceError for another side.
    """
    if side not in SIDES:
        raise SourceError("padding", repr(side), " or ".join(SIDES))
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest + more), dtype=np.int64)
    mask[:, longest:] = 1
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = longest - length if side == "left" else 0
        ids[place, start : start + length] = row
        mask[place, start : start + length] = 1
    last = [longest - 1 if side == "left" else length - 1 for length in lengths]
    return ids, mask, np.array(last, dtype=np.int64)
