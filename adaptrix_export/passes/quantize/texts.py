"""The text that a quantized model's loss is measured on: what its calibration kept apart."""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.measure.calibration import SELF, Calibration, Ids, calibration_rows
from adaptrix_export.plan import Base

ROWS, LENGTH = 8, 128
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class LossText:
    """Rows of token ids, and where they are from."""

    rows: tuple[tuple[int, ...], ...]
    source: str


def has_tokenizer(base: Base) -> bool:
    return base.gguf_file is not None or any((base.folder / n).is_file() for n in TOKENIZERS)


def loss_text(base: Base, calibration: Calibration) -> LossText:
    """At most ROWS rows of LENGTH tokens that `calibration` never learns from.

    None where a model writes its own text: the proof then takes its own prompt.
    """
    if calibration.source(base.task) == SELF:
        return LossText((), "the proof's own prompt")
    positions = base.config.get("max_position_embeddings")
    size = base.architecture.vocab_size
    divided = calibration_rows(calibration, base, size, positions, _no_text)
    rows = divided.held_out[:ROWS, :LENGTH]
    return LossText(tuple(tuple(map(int, row)) for row in rows), divided.source)


def _no_text(rows: int, length: int, seed: int) -> Ids:
    raise UnsupportedError("calibration.text", SELF, "a text")
