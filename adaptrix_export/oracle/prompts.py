"""What the models are asked: real text where there is a tokenizer, seeded token ids elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.thresholds import AROUND, Threshold

PREFILL = 128  # tokens of the long prompt
PROMPT = 16  # tokens before greedy decoding starts
ROWS = (40, 23, 9)  # tokens a row of the ragged batch: coprime enough to fall on no block border
CACHED = 8  # cached steps after a padded prefill

# Prose, figures, code and a few other scripts: rare tokens meet embedding rows that prose does not.
TEXT = """The lighthouse keeper wrote down the weather every four hours for thirty-one years, in the
same blue ink and the same careful hand. On 3 March 1911 he noted 998 hPa, a wind from the
north-west and, for the first time, an airship. Nobody believed him until his daughter found the
photograph, folded twice, inside a tin of tobacco. What did he think he had seen? "A whale," he used
to say, "that had lost its way." The museum keeps the journals in a dry room and lends them to
nobody; visitors may read a copy, printed on both sides, at a table beside the window.

def rainfall(days: list[float], start: int = 0) -> dict[str, float]:
    total = sum(days[start:])
    return {"total": total, "mean": total / max(1, len(days) - start)}

Der Leuchtturm steht noch. Les archives sont ouvertes le mardi, de 9 h 30 à 17 h. 灯台は今も光る。
Between 1880 and 1911 the lamp burned 2,345 litres of oil a year, or 6.42 litres a night, and went
out eleven times: twice for storms, once for a wedding, and eight times for reasons not recorded."""


@dataclass(frozen=True)
class Prompts:
    """Token ids for every case; lengths are already within the model's positions.

    `rows` hold the ragged batch: the last `cached` tokens of each row are fed one at a time.
    """

    source: str  # "text" or "seeded token ids"
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    steps: int
    rows: tuple[tuple[int, ...], ...]
    cached: int
    pad: int | None = None  # the model's own
    pooling: str | None = None
    # What is no text, drawn from a seed: "alone" and "batch", each by the names of the inputs.
    drawn: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)


def drawn_prompts() -> Prompts:
    """No text: the inputs are drawn by what the model takes (`oracle/drawn.py`)."""
    return Prompts("inputs drawn from a seed", (), (), 0, (), 0)


def choose_prompts(
    job: Job, vocabulary: int, positions: int | None, pad: int | None = None
) -> Prompts:
    """Prompts for a model with `vocabulary` tokens and at most `positions` of them in a sequence.

    Raises `ParityError` when the tokenizer makes ids that the model does not have, or when the
    model has too few positions to decode at all.
    """
    # Beyond a length at which a model switches, a prefill in chunks is another thing than one at
    # once, and a row alone than in a batch: those lengths have cases of their own.
    limits = [t.at for t in job.crossings if t.switching]
    positions = min([*limits, *([] if positions is None else [positions])], default=None)
    room = positions if positions is not None else PREFILL + job.steps + ROWS[0] + CACHED
    if room < 4:
        raise ParityError("model", f"{room} positions", "at least 4, to prefill and then decode")
    steps = min(job.steps, room // 2)
    cached = min(CACHED, room // 2)
    source, ids = token_ids(job, vocabulary)
    rows = _rows(ids, [min(length, room - cached) + cached for length in ROWS])
    return Prompts(
        source=source,
        # room for the decode steps is kept, so that every case stays within trained positions
        prefill=ids[: min(PREFILL, room - steps)],
        decode=ids[: min(PROMPT, room - steps)],
        steps=steps,
        rows=rows,
        cached=cached,
        pad=pad,
        pooling=job.pooling,
    )


def crossing(
    job: Job, threshold: Threshold, vocabulary: int, positions: int | None
) -> Prompts | None:
    """Prompts that go beyond a threshold; None where the model has no positions there.

    A prefill of half as much again, so that `CHUNKED` of it lies below; decoding from just before
    to just after; a ragged batch of which one row starts beyond and one crosses while it decodes.
    """
    at = threshold.at
    longest, least = at + max(at // 2, 2 * AROUND), at + 2 * AROUND
    if positions is not None and not threshold.switching:  # rotary embeddings know no end
        if positions < least:
            return None
        longest = min(longest, positions)
    before = max(1, at - AROUND // 2)
    lengths = (at + AROUND // 2, before, max(1, at // 2))
    source, ids = token_ids(job, vocabulary)
    return Prompts(
        source=source,
        prefill=_rows(ids, [longest])[0],
        decode=_rows(ids, [before])[0],
        steps=AROUND,
        rows=_rows(ids, [length + AROUND for length in lengths]),
        cached=AROUND,
    )


def _rows(ids: tuple[int, ...], lengths: list[int]) -> tuple[tuple[int, ...], ...]:
    """One row a length, each from another place in the text, which is taken as a ring."""
    ring = ids * (1 + (sum(lengths) + max(lengths)) // len(ids))
    starts = np.cumsum([0, *lengths[:-1]])
    return tuple(
        ring[start : start + length] for start, length in zip(starts, lengths, strict=True)
    )


def token_ids(job: Job, vocabulary: int) -> tuple[str, tuple[int, ...]]:
    """What the ids are ("text" or "seeded token ids"), and the ids of the job's text."""
    folder, gguf_file = _tokenizer_place(job)
    if folder is None:
        drawn = np.random.default_rng(0).integers(0, vocabulary, size=2 * PREFILL)
        return "seeded token ids", tuple(int(i) for i in drawn)
    from transformers import AutoTokenizer

    extra = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    ids = tuple(int(i) for i in tokenizer(job.text or TEXT)["input_ids"])
    if not ids or max(ids) >= vocabulary:
        raise ParityError(
            f"tokenizer of {folder.name}",
            f"token id {max(ids, default='none')}",
            f"ids below the model's vocabulary of {vocabulary}",
            "does this tokenizer belong to this model?",
        )
    return "text", ids


def _tokenizer_place(job: Job) -> tuple[Path | None, str | None]:
    """The artifact's own tokenizer if it has one, else the base's, else none."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    for folder in (job.artifact, job.base_folder):
        if any((folder / name).is_file() for name in known):
            return folder, None
    return (job.base_folder, job.gguf_file) if job.gguf_file else (None, None)
