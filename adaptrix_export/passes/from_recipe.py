"""The passes that a recipe asks for, in order: each section becomes a frozen pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from adaptrix_export.passes.compose.choose import Auto
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.context import Workshop
from adaptrix_export.plan import Pass
from adaptrix_export.progress import Progress
from adaptrix_export.recipe.compose import AUTO, composition_of
from adaptrix_export.recipe.redistribute import Redistribution
from adaptrix_export.recipe.sections import ComposeSpec

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.redistribute import Redistribute


def compose_of(spec: ComposeSpec, names: Sequence[str], progress: Progress | None = None) -> Pass:
    """The pass that a recipe's `compose` asks for, for adapters of these names, in order.

    Raises RecipeError for options that do not go together.
    """
    if spec.method == AUTO:
        return Auto(tuple(sorted((spec.calibration or {}).items())), progress)
    wanted = composition_of(spec, names)
    return Compose(**{field.name: getattr(wanted, field.name) for field in fields(wanted)})


def redistribution(wanted: Redistribution, shop: Workshop) -> Redistribute:
    """The pass that a recipe's `redistribute` asks for."""
    from adaptrix_export.measure.calibration import Calibration
    from adaptrix_export.passes.redistribute.redistribute import Redistribute

    text = wanted.calibration
    return Redistribute(
        layers=wanted.layers,
        strategy=wanted.strategy.value,
        rank=wanted.rank,
        calibration=Calibration(text.text, text.tokens, text.length, text.seed),
        min_retained=wanted.min_retained,
        steps=wanted.steps,
        max_sites=wanted.max_sites,
        max_bytes=wanted.max_bytes,
        max_memory=wanted.max_memory,
        workshop=shop,
    )
