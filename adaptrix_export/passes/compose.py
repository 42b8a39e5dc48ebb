"""Several adapters into one: the exact sum of their deltas."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaptrix_export.plan import Delta, Plan, Term


@dataclass(frozen=True)
class Compose:
    """`cat`: every site gets the terms of every adapter, so deltas add up and ranks add up.

    A plan with one adapter is returned as it is. What two adapters both replace was refused by
    `verify`.
    """

    method: str = "cat"

    def __call__(self, plan: Plan) -> Plan:
        if len(plan.adapters) < 2:
            return plan
        deltas: dict[str, Delta] = {}
        for adapter in plan.adapters:
            for delta in adapter.deltas:
                known = deltas.get(delta.name)
                terms: tuple[Term, ...] = (*(known.terms if known else ()), *delta.terms)
                deltas[delta.name] = replace(delta, terms=terms)
        first = plan.adapters[0]
        composed = replace(
            first,
            name="+".join(a.name for a in plan.adapters),
            files=tuple(f for a in plan.adapters for f in a.files),
            deltas=tuple(sorted(deltas.values(), key=lambda d: (d.site.order, d.parameter))),
            replacements=tuple(r for a in plan.adapters for r in a.replacements),
        )
        return plan.after(self, adapters=(composed,))
