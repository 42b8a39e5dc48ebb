"""The recipe's section `redistribute`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe.layers import check_layers, parse_layers
from adaptrix_export.recipe.messages import refusal, shown
from adaptrix_export.recipe.sections import Line, Section
from adaptrix_export.recipe.words import Strategy


def _layers(value: object) -> object:
    """A string as `--layers` takes it, or what a recipe says in YAML."""
    if isinstance(value, str):
        value = parse_layers(value)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, tuple)):
        raise refusal(shown(value), "auto, search, a number or a list of numbers")
    try:
        check_layers(value)
    except RecipeError as error:
        raise refusal(error.found, error.expected, error.remedy) from error
    return value


Layers = Annotated[
    str | int | tuple[Annotated[int, Field(ge=0, strict=True)], ...], BeforeValidator(_layers)
]


class CalibrationText(Section):
    """The text that a redistribution is fitted on, and measured on."""

    text: Line = Field(
        default="auto",
        description="A text file, or a .jsonl file with a `text` in each line; pydoc: prose in "
        "the standard library; self: what the adapted model itself writes; auto: self where the "
        "model generates text, else pydoc. A part of it is only measured on.",
    )
    tokens: int = Field(default=8192, ge=1, strict=True, description="Tokens to fit on.")
    length: int = Field(default=256, ge=2, strict=True, description="Tokens in a sequence.")
    seed: int = Field(default=0, ge=0, strict=True, description="For whatever is drawn.")


class Redistribution(Section):
    """The adapters moved onto a few layers, and a report of what that lost."""

    layers: Layers = Field(
        default="auto",
        description="auto: n/4, n/2 and 3n/4 of n layers; 5: that many, spread evenly; [7, 15]: "
        "these; search: the best within max_sites or max_bytes.",
    )
    strategy: Strategy = Field(
        default=Strategy.FIT,
        description="fit: a closed form from calibration text; distill: fit, then a short "
        "training; select: the deltas that are there; fold: sums of neighbouring layers.",
    )
    rank: int | None = Field(
        default=None, ge=1, strict=True,
        description="Rank of what is computed for a site; by default four times the adapter's.",
    )  # fmt: skip
    calibration: CalibrationText = Field(
        default=CalibrationText(), description="The text to fit on and to measure on."
    )
    min_retained: float | None = Field(
        default=None, ge=0, le=1, description="Fail where less of the adapter than this is kept."
    )
    steps: int | None = Field(
        default=None, ge=1, strict=True,
        description="Training steps of distill; by default 100 and 20 for each layer.",
    )  # fmt: skip
    max_sites: int | None = Field(default=None, ge=1, strict=True, description="For search.")
    max_bytes: int | None = Field(default=None, ge=1, strict=True, description="For search.")
    max_memory: int | None = Field(
        default=None, ge=1, strict=True,
        description="Bytes that the model's weights may take while it runs, by default most of "
        "what is free; the layers of a larger one are read from its files as they run.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_budget(self) -> Redistribution:
        budget = self.max_sites is not None or self.max_bytes is not None
        if budget != (self.layers == "search"):
            raise refusal(
                f"layers {self.layers} {'with' if budget else 'without'} a budget",
                "search with max_sites or max_bytes, or neither",
            )
        return self
