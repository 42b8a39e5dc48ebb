"""Which plan stock PEFT can load to stand for what the passes made."""

from __future__ import annotations

from dataclasses import replace

from adaptrix_export.plan import Plan


def reference_plan(opened: Plan, plan: Plan) -> Plan:
    """The plan whose adapters stock PEFT loads as the oracle of `plan`.

    It is `opened`, the plan before any pass, with the adapters of `plan` where a pass has put
    others in their place: redistributed ones, and approximations by LoRA.
    """
    if plan.redistributed:
        return replace(
            opened, adapters=plan.adapters, adjustments=(), measured=plan.measured,
            redistributed=True,
        )  # fmt: skip
    if not plan.losses:
        return opened
    replaced = {loss.adapter for loss in plan.losses}
    adjustments = tuple(
        a for a in opened.adjustments if a.adapter not in replaced or a.kind == "dropped"
    )
    return replace(opened, adapters=plan.adapters, adjustments=adjustments, losses=plan.losses)
