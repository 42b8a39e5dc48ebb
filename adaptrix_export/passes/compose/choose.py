"""`compose: auto`: a method and weights from the conflict report, or from measured divergence.

From the report alone, the first rule that applies (conflict and the others as `conflicts.py` has
them, of the worst pair):

| if | then | because |
|---|---|---|
| cosine >= 0.5 | linear, with balanced weights | they push the same way: their sum overshoots |
| conflict < 0.05 | cat | the adapters hardly meet |
| conflict >= 0.35 | ties | more cancels than chance would: signs are opposed |
| overlap_out or overlap_in >= 0.5 | knots | the same subspace, used differently |
| else | cat | unrelated changes hardly meet in so many dimensions |

Balanced weights w solve G w = diag(G) (least squares, smallest norm), G the inner products of the
adapters' deltas summed over all parameters, cut to [0, 1]: the sum then reaches along each adapter
as far as that adapter alone. Where an adapter is no LoRA, linear stands for cat, ties for knots.

With a text for every adapter, `trial.py` measures every candidate instead, and the one whose worst
adapter loses least is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptrix_export.errors import RecipeError
from adaptrix_export.measure.conflicts import conflicts
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.plan import Plan
from adaptrix_export.plan.composition import Weight
from adaptrix_export.progress import Progress, Silent

MEETS, SAME_WAY, OPPOSED, SAME_SPACE = 0.05, 0.5, 0.35, 0.5


@dataclass(frozen=True)
class Auto:
    """Chooses a `Compose` and runs it; `calibration` holds (adapter, text file) of all or none.

    The report's `choice` says what was chosen and why. A plan with one adapter is left alone.
    """

    calibration: tuple[tuple[str, Path], ...] = ()
    progress: Progress | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        # names of files, never their paths: this ends in a manifest
        texts = ", ".join(f"{name}: {path.name!r}" for name, path in self.calibration)
        return f"Auto(calibration={{{texts}}})" if texts else "Auto()"

    def __call__(self, plan: Plan) -> Plan:
        if len(plan.adapters) < 2:
            return plan
        progress = self.progress or Silent()
        report = plan.measured.get("conflicts") or conflicts(plan, progress)
        if self.calibration:
            from adaptrix_export.measure.trial import compare_candidates  # PyTorch

            missing = {a.name for a in plan.adapters} - {name for name, _ in self.calibration}
            if missing:
                raise RecipeError(
                    "compose.calibration", f"no text for {min(missing)}", "one for each adapter",
                    "add one, or leave calibration out",
                )  # fmt: skip
            possible = candidates(plan, report)
            best, choice = compare_candidates(plan, possible, dict(self.calibration), progress)
            compose = possible[best]
        else:
            compose, why = by_rule(plan, report)
            choice = {"rule": why}
        chosen = {"method": compose.method, "weights": {n: w.default for n, w in compose.weights}}
        section = {"conflicts": report, "choice": {**chosen, **choice}}
        return compose(plan.after(self, measured={**plan.measured, **section}))


def by_rule(plan: Plan, report: Mapping[str, Any]) -> tuple[Compose, str]:
    """The table in the module's docstring: the pass and the reason."""
    pairs = report["pairs"]
    conflict = max(pair["conflict"] for pair in pairs)
    cosine = max(pair["cosine"] for pair in pairs)
    overlap = max(max(p["overlap_out"] or 0.0, p["overlap_in"] or 0.0) for p in pairs)
    exact = Compose("linear" if _other_tuners(plan) else "cat")
    if cosine >= SAME_WAY:
        weights = balanced(report)
        return Compose("linear", weights), f"cosine {cosine:g}: they push the same way"
    if conflict < MEETS:
        return exact, f"conflict {conflict:g} is below {MEETS}: they hardly meet"
    if conflict >= OPPOSED:
        return Compose("ties"), f"conflict {conflict:g} is {OPPOSED} or more: signs are opposed"
    if overlap >= SAME_SPACE:
        method = "ties" if _other_tuners(plan) else "knots"
        return Compose(method), f"overlap {overlap:g}: the same subspace, used differently"
    return exact, f"conflict {conflict:g}, cosine {cosine:g}, overlap {overlap:g}: unrelated"


def candidates(plan: Plan, report: Mapping[str, Any]) -> list[Compose]:
    """What `trial.py` measures, simplest first: it wins where nothing is better."""
    names = [adapter.name for adapter in plan.adapters]
    share = Weight(round(1 / len(names), 6))
    methods = [Compose("linear" if _other_tuners(plan) else "cat")]
    if balanced(report):
        methods.append(Compose("linear", balanced(report)))
    methods.append(Compose("linear", tuple((name, share) for name in sorted(names))))
    methods += [Compose(method) for method in ("magnitude_prune", "ties", "knots", "tsv")]
    return list(dict.fromkeys(methods))


def balanced(report: Mapping[str, Any]) -> tuple[tuple[str, Weight], ...]:
    """The weights of the module's docstring that are not 1, to three digits."""
    names = [adapter["name"] for adapter in report["adapters"]]
    norms = np.array([adapter["norm"] for adapter in report["adapters"]])
    gram = np.diag(norms**2)
    for pair in report["pairs"]:
        i, j = (names.index(name) for name in pair["adapters"])
        gram[i, j] = gram[j, i] = pair["cosine"] * norms[i] * norms[j]
    # six digits are in the report: what is singular but for them shall count as singular
    solution = np.linalg.lstsq(gram, np.diag(gram), rcond=1e-5)[0].clip(0, 1)
    weights = ((n, Weight(round(float(w), 3))) for n, w in zip(names, solution, strict=True))
    return tuple(sorted((n, w) for n, w in weights if w != Weight()))


def _other_tuners(plan: Plan) -> bool:
    return any(t.is_layer_made for a in plan.adapters for d in a.deltas for t in d.terms)
