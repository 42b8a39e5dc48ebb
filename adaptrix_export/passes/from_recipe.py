"""The passes that a recipe asks for, in order: each section becomes a frozen pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from adaptrix_export.passes.approximate import Approximate
from adaptrix_export.passes.compose.choose import Auto
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.context import PassContext
from adaptrix_export.passes.gating import PreserveContext
from adaptrix_export.passes.pool import Pool
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.progress import Progress
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.compose import AUTO, composition_of
from adaptrix_export.recipe.redistribute import Redistribution
from adaptrix_export.recipe.sections import ComposeSpec
from adaptrix_export.recipe.targets import TARGET_FACTS
from adaptrix_export.recipe.words import Pooling

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.redistribute import Redistribute


def passes_of(recipe: Recipe, opened: Plan, context: PassContext) -> tuple[Pass, ...]:
    """Every pass from the plan as it was opened to the one that is lowered, in order.

    Adapters of a target that keeps them apart are not composed, moved or pooled.
    """
    steps: list[Pass] = []
    if TARGET_FACTS[recipe.target].composes:
        names = [adapter.name for adapter in recipe.adapters]
        steps.append(MeasureConflicts(context))
        steps.append(compose_of(recipe.compose, names, context.progress))
        if recipe.redistribute is not None:
            steps.append(redistribution(recipe.redistribute, context))
        if recipe.pooling is not Pooling.NONE:
            steps.append(Pool(recipe.pooling.value))
    if recipe.slots is not None:
        steps.append(Approximate(recipe.slots.rank, context))
    if recipe.context is not None:
        apart = not TARGET_FACTS[recipe.target].composes
        steps.append(
            PreserveContext(recipe.context, recipe.on_mismatch.value, apart, opened, context)
        )
    return tuple(steps)


@dataclass(frozen=True)
class MeasureConflicts:
    """Pass: the conflict report of a plan's adapters, if it has several; changes nothing else."""

    context: PassContext

    def __call__(self, plan: Plan) -> Plan:
        if len(plan.adapters) < 2:
            return plan
        from adaptrix_export.measure.conflicts import conflicts

        report = conflicts(plan, self.context.progress)
        return replace(plan, measured={**plan.measured, "conflicts": report})


def compose_of(spec: ComposeSpec, names: Sequence[str], progress: Progress | None = None) -> Pass:
    """The pass that a recipe's `compose` asks for, for adapters of these names, in order.

    Raises RecipeError for options that do not go together.
    """
    if spec.method == AUTO:
        return Auto(tuple(sorted((spec.calibration or {}).items())), progress)
    options = composition_of(spec, names)
    return Compose(**{field.name: getattr(options, field.name) for field in fields(options)})


def redistribution(spec: Redistribution, context: PassContext) -> Redistribute:
    """The pass that a recipe's `redistribute` asks for."""
    from adaptrix_export.measure.calibration import Calibration
    from adaptrix_export.passes.redistribute.redistribute import Redistribute

    text = spec.calibration
    return Redistribute(
        layers=spec.layers,
        strategy=spec.strategy.value,
        rank=spec.rank,
        calibration=Calibration(text.text, text.tokens, text.length, text.seed),
        min_retained=spec.min_retained,
        steps=spec.steps,
        max_sites=spec.max_sites,
        max_bytes=spec.max_bytes,
        max_memory=spec.max_memory,
        context=context,
    )
