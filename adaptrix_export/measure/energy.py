"""How much each adapter adds at each site, before and after the passes: a section of the manifest.

The figure is the Frobenius norm of the delta. A low-rank term gives it from its factors alone, so
no weight of the base is read; what would need the base (DoRA's norm, other tuners, compositions by
election) is listed without a figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

from adaptrix_export.merge.norms import delta_norm
from adaptrix_export.plan import Adapter, Plan, leaves

DIGITS = 4  # the last digits of a sum depend on the number of threads; these do not

Energies = dict[str, dict[str, float | None]]


def energy(original: Plan, plan: Plan) -> dict[str, Any]:
    """`{"layers": {stack: count}, "before": {adapter: {parameter: norm or None}}, "after": ...}`.

    `after` is None where the passes left every delta as it was.
    """
    before = energies(original.adapters)
    changed = [a.deltas for a in plan.adapters] != [a.deltas for a in original.adapters]
    layers = {stack.prefix: stack.count for stack in plan.base.architecture.stacks}
    return {
        "layers": layers,
        "before": before,
        "after": energies(plan.adapters) if changed else None,
    }


def energies(adapters: Iterable[Adapter]) -> Energies:
    """Adapter -> parameter -> norm; None for what only the base's weights could tell."""
    return {adapter.name: _of_adapter(adapter) for adapter in adapters}


def _of_adapter(adapter: Adapter) -> dict[str, float | None]:
    squares: dict[str, float | None] = {saved.name: None for saved in adapter.replacements}
    for delta in adapter.deltas:
        plain = all(term.lora_magnitude is None for term in leaves(delta.terms))
        norm = delta_norm(delta) if plain else None
        known = squares.get(delta.name, 0.0)
        squares[delta.name] = None if norm is None or known is None else known + norm**2
    return {
        name: None if square is None else float(f"{sqrt(square):.{DIGITS}g}")
        for name, square in sorted(squares.items())
    }
