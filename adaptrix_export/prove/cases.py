"""The ways in which a served model is called, each compared with the reference.

A case is a row of `CASES`: what to ask the reference, and how to get the same logits out of the
artifact. The reference answers first and is unloaded; the artifact then gets the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQ2SEQ, SEQUENCES, SPEECH, TOKENS
from adaptrix_export.oracle.compare import Ids, Logits, distance, rounded
from adaptrix_export.oracle.encoded import (
    encode_left_padded,
    encode_pooled,
    encode_prefill,
    encode_right_padded,
    encode_rows,
)
from adaptrix_export.oracle.job import Tolerance
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.oracle.translated import (
    Source,
    Translating,
    source_of,
    translate_batch,
    translate_chunked,
    translate_left_padded,
    translate_prefill,
    translate_right_padded,
    translate_states,
)
from adaptrix_export.prove.subject import Subject
from adaptrix_export.recipe.targets import Form, facts_of


class Asked(Translating, Protocol):
    """What a case needs of the reference; `reference.Reference` is one."""

    def translated(self, source: Source, steps: int) -> tuple[list[int], Logits]: ...

    def forward(self) -> Logits: ...
    def images(self) -> Logits: ...
    def prefill(self, ids: list[int]) -> Logits: ...
    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]: ...
    def greedy(self, ids: list[int], steps: int) -> tuple[list[int], Logits]: ...
    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits: ...
    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits: ...


class Stepping(Protocol):
    """What has a cache: a Subject, and the reference; `subject.Subject` says what `step` does."""

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]: ...


@dataclass(frozen=True)
class Answer:
    """The reference's logits (positions, vocabulary), and the tokens it picked, if it did."""

    logits: Logits
    tokens: tuple[int, ...] = ()


Ask = Callable[[Asked, Prompts], Answer]
Play = Callable[[Subject, Prompts, Answer], Logits]


@dataclass(frozen=True)
class Case:
    """One row: a name for the report, the question and how the artifact is made to answer it."""

    name: str
    ask: Ask
    play: Play
    graph_only: bool = False
    full_only: bool = False


def ask_prefill(reference: Asked, prompts: Prompts) -> Answer:
    return Answer(reference.prefill(list(prompts.prefill)))


def ask_greedy(reference: Asked, prompts: Prompts) -> Answer:
    tokens, logits = reference.greedy(list(prompts.decode), prompts.steps)
    return Answer(logits, tuple(tokens))


def ask_rows(reference: Asked, prompts: Prompts) -> Answer:
    """Each row of the ragged batch alone and unpadded; causal, so one pass covers decoding too."""
    return Answer(np.concatenate([reference.prefill(list(row)) for row in prompts.rows]))


def play_prefill(subject: Subject, prompts: Prompts, answer: Answer) -> Logits:
    return feed(subject, [prompts.prefill])


def _chunks(prompts: Prompts) -> list[tuple[int, ...]]:
    cut = max(1, len(prompts.prefill) * 3 // 5)  # uneven, so that no length fits by accident
    return [prompts.prefill[:cut], prompts.prefill[cut:]]


def ask_chunked(reference: Asked, prompts: Prompts) -> Answer:
    return Answer(feed(reference, _chunks(prompts)))


def play_chunked(subject: Subject, prompts: Prompts, answer: Answer) -> Logits:
    return feed(subject, _chunks(prompts))


def play_greedy(subject: Subject, prompts: Prompts, answer: Answer) -> Logits:
    """Fed the reference's own tokens: where every argmax agrees, free-running decoding does too."""
    chunks = [prompts.decode, *((token,) for token in answer.tokens[:-1])]
    return feed(subject, chunks)[len(prompts.decode) - 1 :]


def play_left_padded(subject: Subject, prompts: Prompts, answer: Answer) -> Logits:
    return _padded(subject, prompts, left=True)


def play_right_padded(subject: Subject, prompts: Prompts, answer: Answer) -> Logits:
    return _padded(subject, prompts, left=False)


CASES: tuple[Case, ...] = (
    Case("prefill", ask_prefill, play_prefill),
    Case("chunked prefill", ask_prefill, play_chunked, graph_only=True, full_only=True),
    Case("greedy decode", ask_greedy, play_greedy),
    Case("left-padded batch", ask_rows, play_left_padded, graph_only=True, full_only=True),
    Case("right-padded batch", ask_rows, play_right_padded, graph_only=True, full_only=True),
)


# What is asked around a threshold, where a prefill in chunks may not be the prefill at once.
CROSSING: tuple[Case, ...] = (
    Case("prefill", ask_prefill, play_prefill),
    Case("chunked prefill", ask_chunked, play_chunked, graph_only=True),
    Case("decode", ask_greedy, play_greedy),
    Case("left-padded batch", ask_rows, play_left_padded, graph_only=True),
    Case("right-padded batch", ask_rows, play_right_padded, graph_only=True),
)

# Where the longest row of a batch decides for all, PyTorch is asked the padded batch itself.
SWITCHING: tuple[Case, ...] = (
    *CROSSING[:3],
    Case(
        "left-padded batch",
        lambda reference, prompts: Answer(_padded(reference, prompts, left=True)),
        play_left_padded,
        graph_only=True,
    ),
    Case(
        "right-padded batch",
        lambda reference, prompts: Answer(_padded(reference, prompts, left=False)),
        play_right_padded,
        graph_only=True,
    ),
)


def _encoded(name: str, question: Callable[[Any, Prompts], Logits], full: bool) -> Case:
    """The same question for both sides."""
    return Case(
        name,
        lambda reference, prompts: Answer(question(reference, prompts)),
        lambda subject, prompts, answer: question(subject, prompts),
        full_only=full,
    )


_ENCODED = (
    _encoded("prefill", encode_prefill, False),
    _encoded("left-padded batch", encode_left_padded, True),
    _encoded("right-padded batch", encode_right_padded, True),
)
_BY_ROW = (_encoded("prefill", encode_prefill, False), _encoded("rows", encode_rows, True))


def _ask_translated(reference: Asked, prompts: Prompts) -> Answer:
    """Tokens are those fed, the start token first."""
    tokens, logits = reference.translated(source_of(prompts, prompts.decode), prompts.steps)
    return Answer(logits, tuple(tokens))


def _play_translated(subject: Any, prompts: Prompts, answer: Answer) -> Logits:
    source = source_of(prompts, prompts.decode)
    logits: Logits = subject.translate(source, [[t] for t in answer.tokens])[0]
    return logits


_DICTATED = (
    _encoded("encoder", translate_states, False),
    _encoded("prefill", translate_prefill, False),
    Case(
        "chunked prefill",
        lambda reference, prompts: Answer(translate_prefill(reference, prompts)),
        lambda subject, prompts, answer: translate_chunked(cast(Translating, subject), prompts),
        graph_only=True,
        full_only=True,
    ),
    Case("greedy decode", _ask_translated, _play_translated),
)
_TRANSLATED = (
    *_DICTATED,
    _encoded("left-padded batch", translate_left_padded, True),
    _encoded("right-padded batch", translate_right_padded, True),
)
# Types and tasks without cases of their own: inputs drawn from a seed.
_DRAWN = (_encoded("forward", lambda model, prompts: cast(Logits, model.forward()), False),)
_IMAGES = _encoded("image features", lambda model, prompts: cast(Logits, model.images()), False)
_POOLED = _encoded("sentence embedding", encode_pooled, False)
TASK_CASES: dict[str, tuple[Case, ...]] = {
    GENERATION: CASES,
    FEATURES: _ENCODED,
    TOKENS: _ENCODED,
    SEQUENCES: _ENCODED,
    SEQ2SEQ: _TRANSLATED,
    SPEECH: (*_DICTATED, _encoded("batch", translate_batch, True)),
}


def select(
    target: str,
    level: str,
    task: str = GENERATION,
    *,
    pooling: str | None = None,
    batches: bool = True,
) -> tuple[Case, ...]:
    """The cases for a target, a level and a task, in report order.

    `pooling` says that the artifact makes one vector a row, too; without `batches` a classifier
    of sequences is asked row by row.
    """
    graph = facts_of(target).form is Form.GRAPH
    cases = TASK_CASES[task] if task != SEQUENCES or batches else _BY_ROW
    return tuple(
        case
        for case in (*cases, *((_POOLED,) if pooling else ()))
        if (graph or not case.graph_only) and not (case.full_only and level != "full")
    )


def drawn_cases(images: bool) -> tuple[Case, ...]:
    """The cases of a model whose names were read off its class; with those of its vision tower."""
    return (*_DRAWN, *((_IMAGES,) if images else ()))


def select_crossing(target: str, task: str, switching: bool) -> tuple[Case, ...]:
    """The cases around a threshold; a model without a cache passes it in its usual cases."""
    if task != GENERATION:
        return ()
    cases = SWITCHING if switching else CROSSING
    graph = facts_of(target).form is Form.GRAPH
    return tuple(case for case in cases if graph or not case.graph_only)


def ask_all(cases: Iterable[Case], reference: Asked, prompts: Prompts) -> dict[Ask, Answer]:
    """Every question once, however many cases share it."""
    answers: dict[Ask, Answer] = {}
    for case in cases:
        if case.ask not in answers:
            answers[case.ask] = case.ask(reference, prompts)
    return answers


def compare(
    case: Case, subject: Subject, prompts: Prompts, answer: Answer, tolerance: Tolerance
) -> dict[str, Any]:
    """The report's entry for one case."""
    logits = case.play(subject, prompts, answer)
    difference = distance(answer.logits, logits)
    return {
        "name": case.name,
        "positions": len(answer.logits),
        "finite": difference.finite,
        "max_abs": rounded(difference.max_abs),
        "mean_kl": rounded(difference.mean_kl),
        "top1": rounded(difference.top1, 5),
        "tolerance": {
            "max_abs": tolerance.max_abs,
            "mean_kl": tolerance.mean_kl,
            "top1": tolerance.top1,
        },
        "passed": difference.within(tolerance),
    }


def feed(subject: Stepping, chunks: Iterable[tuple[int, ...]]) -> Logits:
    """One unpadded row, chunk after chunk through the cache. Returns (tokens, vocabulary)."""
    logits: list[Logits] = []
    cache, past = None, 0
    for chunk in chunks:
        if not chunk:
            continue
        ids = np.array([chunk], dtype=np.int64)
        positions = np.arange(past, past + len(chunk), dtype=np.int64)[None]
        past += len(chunk)
        out, cache = subject.step(ids, np.ones((1, past), np.int64), positions, cache)
        logits.append(out[0])
    return np.concatenate(logits)


def _padded(subject: Stepping, prompts: Prompts, *, left: bool) -> Logits:
    """The ragged batch padded to one length, then one token a row and step through the cache.

    Pads are token 0, masked; positions count real tokens, as transformers feeds them. After right
    padding the mask keeps its zeros in the middle. Returns the rows' real tokens in order,
    (tokens of all rows, vocabulary).
    """
    lengths = [len(row) - prompts.cached for row in prompts.rows]
    rows = [row[:n] for row, n in zip(prompts.rows, lengths, strict=True)]
    ids, mask, positions = padded_batch(rows, left=left)
    starts = [max(lengths) - n if left else 0 for n in lengths]
    out, cache = subject.step(ids, mask, positions, None)
    logits = [
        [out[r, start : start + n]]
        for r, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    for step in range(prompts.cached):
        fed = [[row[n + step]] for row, n in zip(prompts.rows, lengths, strict=True)]
        mask = np.concatenate([mask, np.ones((len(lengths), 1), np.int64)], axis=1)
        out, cache = subject.step(np.array(fed, np.int64), mask, _positions(mask)[:, -1:], cache)
        for r, part in enumerate(logits):
            part.append(out[r])
    return np.concatenate([piece for part in logits for piece in part])


def padded_batch(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Ids, Ids, Ids]:
    """Ids, mask and positions (rows, longest) of rows padded with token 0 on one side."""
    width = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for r, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[r, start : start + len(row)] = row
        mask[r, start : start + len(row)] = 1
    return ids, mask, _positions(mask)


def _positions(mask: Ids) -> Ids:
    return np.asarray(np.maximum(mask.cumsum(axis=1) - 1, 0))
