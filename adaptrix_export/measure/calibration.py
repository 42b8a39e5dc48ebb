"""The text that a redistribution is fitted on and measured on, as rows of token ids.

Rows are cut from the text at fixed places, shuffled by a seed, and divided: the first ones to fit
on, the others, which no strategy ever sees, to measure fidelity on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.errors import RecipeError
from adaptrix_export.load.text import read_text
from adaptrix_export.plan import Base

AUTO, SELF, PYDOC = "auto", "self", "pydoc"
MEASURED = 4  # a row to measure on for every so many to fit on
EVERY = 10  # of pydoc's topics, in sorted order: every tenth is measured on, the others fitted on
LEAST = 8  # tokens: one to predict from, and a fifth of the others to choose a penalty by
Ids = NDArray[np.int64]
Generate = Callable[[int, int, int], Ids]  # rows, tokens a row, seed -> ids


@dataclass(frozen=True)
class Calibration:
    """`text` is a file (.jsonl: the `text` of each line), `pydoc` (the reference prose in the
    standard library), `self` (what the adapted model itself writes), or `auto`: `self` where the
    model generates, else `pydoc`. `tokens` are fitted on, in rows of `length`.
    """

    text: str = AUTO
    tokens: int = 8192
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(
                    f"calibration.{name}", str(getattr(self, name)), f"at least {least}"
                )

    def __repr__(self) -> str:
        # the name of a file, never its path: this ends in a manifest
        return (
            f"Calibration(text={Path(self.text).name!r}, tokens={self.tokens}, "
            f"length={self.length}, seed={self.seed})"
        )

    def source(self, task: str) -> str:
        """What `auto` means for a task."""
        if self.text != AUTO:
            return self.text
        return SELF if task == GENERATION else PYDOC


@dataclass(frozen=True)
class Rows:
    """Token ids (rows, length): `fit` to learn from, `held_out` to measure on; where they are from.

    `more` are rows beside `fit`, for a strategy that learns from each of them once.
    """

    fit: Ids
    held_out: Ids
    source: str
    notes: tuple[str, ...] = field(default=())
    more: Ids = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @property
    def tokens(self) -> int:
        """That something is learnt from."""
        return int(self.fit.size + self.more.size)


def calibration_rows(
    calibration: Calibration,
    base: Base,
    vocabulary: int,
    room: int | None,
    generate: Generate,
    more_tokens: int = 0,
) -> Rows:
    """Rows for a model of `vocabulary` tokens and at most `room` positions.

    `generate` writes rows of the adapted model's own text. With `more_tokens`, there are `more`
    rows until there are so many tokens, as far as the text goes. Raises RecipeError for a text that
    cannot be read, is too short, or has tokens that the model does not know.
    """
    source = calibration.source(base.task)
    length = min(calibration.length, room or calibration.length)
    count = max(1, calibration.tokens // length)
    more = max(0, more_tokens // length - count)
    if source == SELF:
        rows = _generated(calibration, base, generate, count, length, more)
    elif source == PYDOC:
        rows = _pydoc(calibration, base, count, length, more)
    else:
        ids = _tokens(base, _texts(Path(source)), source)
        rows = _divided(ids, calibration, count, length, Path(source).name, more)
    top = max(int(ids.max(initial=0)) for ids in (rows.fit, rows.held_out, rows.more))
    if top >= vocabulary:
        raise RecipeError(
            f"calibration.text: {rows.source}", f"token {top}", f"tokens below {vocabulary}",
            "does the tokenizer belong to the base?",
        )  # fmt: skip
    return rows


def _generated(
    calibration: Calibration, base: Base, generate: Generate, count: int, length: int, more: int
) -> Rows:
    if base.task != GENERATION:
        raise RecipeError(
            "calibration.text", f"{SELF} with task {base.task}", f"a text file or {PYDOC}",
            "only a model that generates text can write its own",
        )  # fmt: skip
    held_count = max(1, count // MEASURED)
    ids = generate(count + held_count + more, length, calibration.seed)
    fit, held_out, rest = np.split(ids, [count, count + held_count])
    return Rows(fit, held_out, "text that the adapted model wrote", (), rest)


def _pydoc(calibration: Calibration, base: Base, rows_to_fit: int, length: int, more: int) -> Rows:
    from pydoc_data.topics import topics

    names = sorted(topics)
    parts = []
    for chosen, count in (
        ([n for i, n in enumerate(names) if i % EVERY], rows_to_fit),
        (names[::EVERY], max(1, rows_to_fit // MEASURED)),
    ):
        ids = _tokens(base, [topics[name] for name in chosen], PYDOC)
        rows = _shuffled(_cut(ids, length), calibration.seed)
        parts += [rows[:count], rows[count : count + more]]
    fit, rest, held_out, _ = parts
    name = "pydoc_data.topics of the standard library"
    return Rows(fit, held_out, name, _short(fit, rows_to_fit), rest)


def _divided(
    ids: Ids, calibration: Calibration, count: int, length: int, name: str, more: int
) -> Rows:
    """Rows of one text; a text of a single row is itself divided, four fifths and one."""
    if len(ids) < LEAST:
        raise RecipeError(
            f"calibration.text: {name}", f"{len(ids)} tokens", f"at least {LEAST}",
            "give a longer text",
        )  # fmt: skip
    if len(ids) < 2 * length:
        cut = len(ids) - max(2, len(ids) // (MEASURED + 1))
        note = f"only {len(ids)} tokens in {name}: {cut} fitted on, {len(ids) - cut} measured on"
        return Rows(ids[None, :cut][:, :length], ids[None, cut:][:, :length], name, (note,))
    rows = _shuffled(_cut(ids, length), calibration.seed)
    held_count = min(max(1, count // MEASURED), max(1, len(rows) // (MEASURED + 1)))
    cuts = [held_count, held_count + count, held_count + count + more]
    held_out, fit, rest, _ = np.split(rows, cuts)
    return Rows(fit, held_out, name, _short(fit, count), rest)


def _short(fit: Ids, count: int) -> tuple[str, ...]:
    if len(fit) >= count:
        return ()
    return (f"the text gave {fit.size} calibration tokens of {count * fit.shape[1]}",)


def _cut(ids: Ids, length: int) -> Ids:
    rows = len(ids) // length
    return ids[: rows * length].reshape(rows, length)


def _shuffled(rows: Ids, seed: int) -> Ids:
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def _texts(path: Path) -> list[str]:
    """The documents in a file: the whole of it, or the `text` of each line of a .jsonl file."""
    place = f"calibration.text: {path.name}"
    content = read_text(path, place)
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{place}, line {number}", line[:40], '{"text": ...}') from error
        if not isinstance(text, str):
            raise RecipeError(f"{place}, line {number}", repr(text)[:40], "a string as text")
        texts.append(text)
    return texts


def _tokens(base: Base, texts: Sequence[str], source: str) -> Ids:
    """All texts as one stream of ids, each ended by the end token where there is one."""
    tokenizer = _tokenizer(base, source)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for text in texts:
        stream += [int(i) for i in tokenizer(text)["input_ids"]] + end
    return np.array(stream, np.int64)


def _tokenizer(base: Base, source: str) -> Any:
    from transformers import AutoTokenizer

    from adaptrix_export.load.tokenizer_files import TOKENIZER_FILES

    files = [path for pattern in TOKENIZER_FILES for path in base.folder.glob(pattern)]
    if base.gguf_file is None and not files:
        raise RecipeError(
            f"calibration.text: {source}", "a base without a tokenizer", "one",
            f"add the tokenizer's files to the base, or calibrate on `{SELF}`",
        )  # fmt: skip
    extra = {"gguf_file": base.gguf_file} if base.gguf_file else {}
    # A long text is cut into rows here; the tokenizer would warn of its length.
    return AutoTokenizer.from_pretrained(
        base.folder, local_files_only=True, model_max_length=10**12, **extra
    )
