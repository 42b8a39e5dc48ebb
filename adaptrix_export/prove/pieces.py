"""The cases of a model that answers in one call: each output of each graph, one row and several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from adaptrix_export.arch.pieces import Piece
from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.oracle.whole import Answering
from adaptrix_export.prove.cases import Answer, Case


def cases_of(pieces: Iterable[Piece]) -> tuple[Case, ...]:
    """In the order of the rows: "logits, alone", "logits, batch", ..."""
    all_pieces = tuple(pieces)
    return tuple(
        _case(piece, output, rows, several=len(all_pieces) > 1)
        for piece in all_pieces
        for output in piece.outputs
        for rows in ("alone", "batch")
    )


def _case(piece: Piece, output: str, rows: str, several: bool) -> Case:
    def question(model: Answering, prompts: Prompts) -> Logits:
        return model.answer(piece, prompts.drawn[rows], output)

    start = f"{piece.file.removesuffix('.onnx')}: " if several else ""
    return Case(
        f"{start}{output}, {rows}",
        lambda reference, prompts: Answer(question(cast(Answering, reference), prompts)),
        lambda subject, prompts, answer: question(cast(Answering, subject), prompts),
    )
