"""The deltas of a plan's adapters by parameter."""

from __future__ import annotations

from adaptrix_export.plan.adapter import Adapter, Delta
from adaptrix_export.plan.plan import Plan


def shares_of(plan: Plan) -> dict[str, list[tuple[Adapter, Delta]]]:
    """Parameter name -> (adapter, delta) pairs, in the order of the adapters."""
    by_parameter: dict[str, list[tuple[Adapter, Delta]]] = {}
    for adapter in plan.adapters:
        for delta in adapter.deltas:
            by_parameter.setdefault(delta.name, []).append((adapter, delta))
    return by_parameter
