"""What a recipe's `context` makes of a plan: gates, a tau that is measured, what they leave.

Adapters that become one are gated together. In slots each stays by itself: then a calibrated tau
holds for every adapter alone, and what the gates leave is not measured, because no one model has
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.text import read_text
from adaptrix_export.measure.drift import SHARE, measure, measure_apart
from adaptrix_export.passes.context import PassContext
from adaptrix_export.passes.reference_plan import reference_plan
from adaptrix_export.passes.wire_context import PerLayer, WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.recipe.sections import Context


@dataclass(frozen=True)
class PreserveContext:
    """Pass: the gates that a recipe's `context` asks for, and a report of what they leave.

    `opened` is the plan before any pass, whose adapters PEFT can load; `apart` says that the
    adapters stay by themselves, in slots.
    """

    spec: Context
    on_mismatch: str
    apart: bool
    opened: Plan = field(repr=False, compare=False)
    context: PassContext = field(repr=False, compare=False)

    def __call__(self, plan: Plan) -> Plan:
        measured_on = plan if self.apart else reference_plan(self.opened, plan)
        wire = WireContext(
            mode=self.spec.mode.value,
            tau=self._tau(measured_on),
            weight=_by_layer(self.spec.weight),
            scope=self.spec.scope.value,
            stats=self.spec.stats,
            on_mismatch=self.on_mismatch,
        )
        gated = verify(wire(plan))
        return gated if self.apart else self._with_effect(gated)

    def _tau(self, measured_on: Plan) -> float | PerLayer | None:
        """As it is given, or measured on a plan whose adapters PEFT can load."""
        tau = self.spec.tau
        if not isinstance(tau, str):
            return _by_layer(tau)
        progress, scope = self.context.progress, self.spec.scope.value
        drift = (measure_apart if self.apart else measure)(measured_on, progress, self._text())
        share = SHARE if self.spec.share is None else self.spec.share
        measured = drift.tau(share, scope)
        progress.note(f"context: tau {measured:g}, measured over {drift.tokens} tokens")
        return measured

    def _with_effect(self, gated: Plan) -> Plan:
        """The gated plan with what it makes of the adapters, beside their plain merge."""
        from adaptrix_export.measure import effect  # PyTorch

        section = effect.measure(
            self.opened, gated, self.context.held_out(), self._text(), self.context.progress
        )
        return replace(gated, measured={**gated.measured, effect.EFFECT: section})

    def _text(self) -> str | None:
        return read_text(self.spec.text, "context.text") if self.spec.text else None


def _by_layer(value: float | dict[int, float] | None) -> float | PerLayer | None:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value
