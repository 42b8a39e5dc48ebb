"""`on_mismatch`: refuse or drop sites that do not fit the base."""

from __future__ import annotations

from dataclasses import replace

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.fit.adjust import adjusted
from adaptrix_export.load.fit.invariants import misfits
from adaptrix_export.load.fit.replication import repeat_layers
from adaptrix_export.plan import Adapter, Adjustment, Plan, Site


def fitted(plan: Plan, on_mismatch: str) -> Plan:
    """Prepare a plan that was just opened for the passes: repeat layers if an adapter requires it,
    make exact adjustments, and with "drop" remove sites that do not fit."""
    plan = adjusted(repeat_layers(plan))
    return drop_misfits(plan) if on_mismatch == "drop" else plan


def drop_misfits(plan: Plan) -> Plan:
    """The plan without the sites whose tensors do not fit, each recorded with the reason.

    Weight and bias of a site are dropped together. Raises AdapterError if an adapter has no site
    left, UnsupportedError for tuners whose sites are not independent.
    """
    reasons: dict[tuple[str, Site], str] = {}
    for misfit in misfits(plan):
        if misfit.site is not None:
            error = misfit.error
            text = f"dropped: {error.found}" + (
                f", expected {error.expected}" * bool(error.expected)
            )
            reasons.setdefault((misfit.adapter, misfit.site), text)
    adapters = tuple(_without(adapter, reasons) for adapter in plan.adapters)
    notes = tuple(
        Adjustment(name, "dropped", site.path, text)
        for (name, site), text in sorted(reasons.items(), key=lambda r: (r[0][0], r[0][1].order))
    )
    return replace(plan, adapters=adapters, adjustments=(*plan.adjustments, *notes))


def _without(adapter: Adapter, reasons: dict[tuple[str, Site], str]) -> Adapter:
    dropped = {site for name, site in reasons if name == adapter.name}
    if not dropped:
        return adapter
    kind = adapter.config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(
            f"{adapter.name}: on_mismatch", f"drop with a {kind} adapter", "a LoRA",
            "use on_mismatch: error",
        )  # fmt: skip
    deltas = tuple(d for d in adapter.deltas if d.site not in dropped)
    replacements = tuple(r for r in adapter.replacements if r.site not in dropped)
    if not deltas and not replacements:
        raise AdapterError(
            adapter.name, f"none of its {len(dropped)} sites fits the base", "at least one",
            "was this adapter trained on another model?",
        )  # fmt: skip
    return replace(adapter, deltas=deltas, replacements=replacements)
