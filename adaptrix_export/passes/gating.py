"""What a recipe's `context` makes of a plan: gates, a tau that is measured, what they leave.

Adapters that become one are gated together. In slots each stays by itself: then a calibrated tau
holds for every adapter alone, and what the gates leave is not measured, because no one model has
all of them.
"""

from __future__ import annotations

from dataclasses import replace

from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.text import read_text
from adaptrix_export.measure.drift import SHARE, measure, measure_apart
from adaptrix_export.passes.context import Workshop
from adaptrix_export.passes.reference_plan import reference_plan
from adaptrix_export.passes.wire_context import PerLayer, WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.sections import Context
from adaptrix_export.recipe.words import Target


def with_context(recipe: Recipe, original: Plan, plan: Plan, shop: Workshop) -> Plan:
    """The plan after every other pass with the gates that its recipe asks for; `original` is the
    plan before any pass, whose adapters PEFT can load."""
    if recipe.context is None:
        return plan
    apart = recipe.target is Target.ONNX_SWITCHABLE
    asked = plan if apart else reference_plan(original, plan)
    tau = _tau(recipe.context, asked, apart, shop.progress)
    wire = WireContext(
        mode=recipe.context.mode.value,
        tau=tau,
        weight=_by_layer(recipe.context.weight),
        scope=recipe.context.scope.value,
        stats=recipe.context.stats,
        on_mismatch=recipe.on_mismatch.value,
    )
    gated = verify(wire(plan))
    return gated if apart else _with_effect(original, gated, recipe.context, shop)


def with_gates_of(gated: Plan, plain: Plan, plan: Plan) -> Plan:
    """`plan` with what made `gated` of `plain`: gates, history, figures, sites that got none."""
    dropped = tuple(a for a in gated.adjustments if a not in plain.adjustments)
    return replace(
        plan,
        gates=gated.gates,
        gate_stats=gated.gate_stats,
        history=gated.history,
        measured=gated.measured,
        adjustments=plan.adjustments + dropped,
    )


def _tau(
    context: Context, measured_on: Plan, apart: bool, progress: Progress
) -> float | PerLayer | None:
    """As it is given, or measured on a plan whose adapters PEFT can load (`measure/drift.py`)."""
    if not isinstance(context.tau, str):
        return _by_layer(context.tau)
    drift = (measure_apart if apart else measure)(measured_on, progress, _text(context))
    tau = drift.tau(SHARE if context.share is None else context.share, context.scope.value)
    progress.note(f"context: tau {tau:g}, measured over {drift.tokens} tokens")
    return tau


def _with_effect(original: Plan, plan: Plan, context: Context, shop: Workshop) -> Plan:
    """The gated plan with what it makes of the adapters, beside their plain merge."""
    from adaptrix_export.measure import effect

    found = effect.measure(original, plan, shop.held(), _text(context), shop.progress)
    return replace(plan, measured={**plan.measured, effect.EFFECT: found})


def _text(context: Context) -> str | None:
    return read_text(context.text, "context.text") if context.text else None


def _by_layer(value: float | dict[int, float] | None) -> float | PerLayer | None:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value
