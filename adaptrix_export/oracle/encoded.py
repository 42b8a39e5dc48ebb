"""The ways in which a model without a cache is asked: a row, a padded batch, row by row.

Positions count pads, so a padded row is compared with the same padded row of the reference, on its
real tokens. Pads are the model's own: RoBERTa counts positions by them, and a decoder that
classifies finds the last token by them. One without a pad token takes no batch, so it is asked row
by row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import numpy as np

from adaptrix_export.oracle.compare import Ids, Logits
from adaptrix_export.oracle.prompts import Prompts


class Encoding(Protocol):
    """What encodes whole rows: the reference, or an artifact without a cache."""

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits: ...
    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits: ...


def _encoded_rows(model: Encoding, rows: Iterable[tuple[int, ...]]) -> Logits:
    """Each row alone and unpadded; returns (tokens of all rows, width), or a row for each row."""
    found = []
    for row in rows:
        ids = np.array([row], np.int64)
        found.append(model.encode(ids, np.ones_like(ids), _segments(ids))[0])
    return np.concatenate(found)


def _encoded_batch(model: Encoding, prompts: Prompts, left: bool) -> Logits:
    """The ragged batch in one call, the real tokens' values in order."""
    ids, mask = padded_rows(prompts, left)
    found = model.encode(ids, mask, _segments(ids))
    return found[:, 0] if found.shape[1] == 1 else found[mask == 1]


def padded_rows(prompts: Prompts, left: bool) -> tuple[Ids, Ids]:
    """Token ids and mask of the ragged batch, (rows, longest)."""
    width = max(len(row) for row in prompts.rows)
    mask = np.zeros((len(prompts.rows), width), np.int64)
    ids = np.full_like(mask, prompts.pad or 0)
    for r, row in enumerate(prompts.rows):
        start = width - len(row) if left else 0
        ids[r, start : start + len(row)] = row
        mask[r, start : start + len(row)] = 1
    return ids, mask


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


def encode_pooled(model: Encoding, prompts: Prompts) -> Logits:
    """One vector a row of the batch padded on the right: (rows, width)."""
    assert prompts.pooling is not None
    ids, mask = padded_rows(prompts, left=False)
    return model.pool(ids, mask, _segments(ids), prompts.pooling)[:, 0]


def pooled(hidden: Logits, mask: Ids, kind: str) -> Logits:
    """The vector that `kind` makes of hidden states (batch, tokens, width): (batch, 1, width)."""
    if kind == "cls":
        return hidden[:, :1]
    weight = mask[:, :, None].astype(np.float64)
    total = (hidden.astype(np.float64) * weight).sum(1, keepdims=True)
    return cast(Logits, (total / np.maximum(weight.sum(1, keepdims=True), 1)).astype(np.float32))
