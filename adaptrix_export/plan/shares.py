"""What each adapter of a plan adds, parameter by parameter."""

from __future__ import annotations

from adaptrix_export.plan.adapter import Adapter, Delta
from adaptrix_export.plan.plan import Plan


def shares_of(plan: Plan) -> dict[str, list[tuple[Adapter, Delta]]]:
    """Parameter name -> what each adapter adds to it, in the order of the adapters."""
    found: dict[str, list[tuple[Adapter, Delta]]] = {}
    for adapter in plan.adapters:
        for delta in adapter.deltas:
            found.setdefault(delta.name, []).append((adapter, delta))
    return found
