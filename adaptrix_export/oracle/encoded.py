"""The ways in which a model without a cache is asked: a row, a padded batch, row by row.

Positions count pads, so a padded row is compared with the same padded row of the reference, on its
real tokens. Pads are the model's own: RoBERTa counts positions by them, and a decoder that
classifies finds the last token by them. One without a pad token takes no batch, so it is asked row
by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.oracle.compare import Ids, Logits
from adaptrix_export.oracle.prompts import Prompts

Float64 = NDArray[np.float64]


class Encoding(Protocol):
    """What encodes whole rows: the reference, or an artifact without a cache."""

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits: ...
    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits: ...


def _encoded_rows(model: Encoding, rows: Iterable[tuple[int, ...]]) -> Logits:
    """Each row alone and unpadded; returns (tokens of all rows, width), or a row for each row."""
    outputs = []
    for row in rows:
        ids = np.array([row], np.int64)
        outputs.append(model.encode(ids, np.ones_like(ids), _segments(ids))[0])
    return np.concatenate(outputs)


def _encoded_batch(model: Encoding, prompts: Prompts, left: bool) -> Logits:
    """The ragged batch in one call, the real tokens' values in order."""
    ids, mask = padded_rows(prompts, left)
    output = model.encode(ids, mask, _segments(ids))
    return output[:, 0] if output.shape[1] == 1 else output[mask == 1]


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
    """One vector a row of the batch, padded on either side: (twice the rows, width)."""
    assert prompts.pooling is not None
    vectors = []
    for left in (False, True):
        ids, mask = padded_rows(prompts, left=left)
        vectors.append(model.pool(ids, mask, _segments(ids), prompts.pooling)[:, 0])
    return np.concatenate(vectors)


def pooled(hidden: Logits, mask: Ids, kind: str) -> Logits:
    """The vector that `kind` makes of hidden states (batch, tokens, width): (batch, 1, width).

    As sentence-transformers does; several kinds, joined by `+`, stand one after the other.
    """
    states, token_mask = hidden.astype(np.float64), mask[:, :, None].astype(np.float64)
    parts = [_POOLED[part](states, token_mask) for part in kind.split("+")]
    return cast(Logits, np.concatenate(parts, axis=2).astype(np.float32))


def _mean(states: Float64, token_mask: Float64, power: float = 1.0) -> Float64:
    count = np.maximum(token_mask.sum(1, keepdims=True), 1)
    return cast(Float64, (states * token_mask).sum(1, keepdims=True) / count**power)


def _weighted_mean(states: Float64, token_mask: Float64) -> Float64:
    weights = token_mask * np.arange(1, states.shape[1] + 1)[None, :, None]
    total = np.maximum(weights.sum(1, keepdims=True), 1)
    return cast(Float64, (states * weights).sum(1, keepdims=True) / total)


def _largest(states: Float64, token_mask: Float64) -> Float64:
    return cast(Float64, np.where(token_mask == 0, -1e9, states).max(1, keepdims=True))


def _last(states: Float64, token_mask: Float64) -> Float64:
    vectors = np.zeros_like(states[:, :1])
    for row, places in enumerate(token_mask[:, :, 0]):
        if places.any():
            vectors[row, 0] = states[row, np.flatnonzero(places)[-1]]
    return vectors


_POOLED: dict[str, Callable[[Float64, Float64], Float64]] = {
    "cls": lambda states, token_mask: states[:, :1],
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": lambda states, token_mask: _mean(states, token_mask, 0.5),
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
