"""The cases of a vision-language model: its images, and text around them with the cache."""

from __future__ import annotations

from typing import Any

from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.prove.cases import Answer, Case

STEPS = 6  # tokens that are fed one by one


def _case(name: str, rows: str, cut: int | None) -> Case:
    def question(model: Any, prompts: Prompts) -> Logits:
        source = prompts.drawn[rows]
        logits: Logits = model.look(source) if cut is None else model.converse(source, cut)
        return logits

    return Case(
        name,
        lambda reference, prompts: Answer(question(reference, prompts)),
        lambda subject, prompts, answer: question(subject, prompts),
    )


SEEING = (
    _case("image features", "batch", None),
    _case("prefill with an image", "alone", 0),
    _case("decode after an image", "alone", STEPS),
    _case("batch of images", "batch", STEPS),
)
