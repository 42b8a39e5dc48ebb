"""The ways in which a model without a cache is asked: a row, a padded batch, row by row.

Positions count pads, so a padded row is compared with the same padded row of the reference, on its
real tokens. A classifier of whole sequences is asked row by row: which batches it takes is up to
its pad token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import numpy as np

from adaptrix_export.check.compare import Logits
from adaptrix_export.check.prompts import Prompts
from adaptrix_export.check.subject import Ids


class Encoding(Protocol):
    """What encodes whole rows: the reference, or an artifact without a cache."""

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits: ...


def _encoded_rows(model: Encoding, rows: Iterable[tuple[int, ...]]) -> Logits:
    """Each row alone and unpadded; returns (tokens of all rows, width), or a row for each row."""
    found = []
    for row in rows:
        ids = np.array([row], np.int64)
        found.append(model.encode(ids, np.ones_like(ids), _segments(ids))[0])
    return np.concatenate(found)


def _encoded_batch(model: Encoding, prompts: Prompts, left: bool) -> Logits:
    """The ragged batch in one call, the real tokens' values in order."""
    width = max(len(row) for row in prompts.rows)
    ids, mask = np.zeros((2, len(prompts.rows), width), np.int64)
    for r, row in enumerate(prompts.rows):
        start = width - len(row) if left else 0
        ids[r, start : start + len(row)] = row
        mask[r, start : start + len(row)] = 1
    return cast(Logits, model.encode(ids, mask, _segments(ids))[mask == 1])


def _segments(ids: Ids) -> Ids:
    """Token types: the second half of every row is a second segment."""
    types = np.zeros_like(ids)
    types[:, ids.shape[1] // 2 :] = 1
    return types


def encode_prefill(model: Encoding, prompts: Prompts) -> Logits:
    return _encoded_rows(model, [prompts.prefill])


def encode_rows(model: Encoding, prompts: Prompts) -> Logits:
    return _encoded_rows(model, prompts.rows)


def encode_left_padded(model: Encoding, prompts: Prompts) -> Logits:
    return _encoded_batch(model, prompts, left=True)


def encode_right_padded(model: Encoding, prompts: Prompts) -> Logits:
    return _encoded_batch(model, prompts, left=False)
