"""Which plan stock PEFT can load to stand for what the passes made."""

from __future__ import annotations

from dataclasses import replace

from adaptrix_export.plan import Plan


def reference_plan(original: Plan, plan: Plan) -> Plan:
    """The plan whose adapters stock PEFT loads: the original one, or that of the redistribution."""
    if not plan.redistributed:
        return original
    return replace(
        original,
        adapters=plan.adapters,
        adjustments=(),
        history=(),
        measured=plan.measured,
        redistributed=True,
    )
