"""Several artifacts side by side: one row a figure, one column an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adaptrix_export.show.facts import Facts, bound_share
from adaptrix_export.show.sections import Sheet, number, size

if TYPE_CHECKING:
    from rich.table import Table


def _worst(facts: Facts) -> str:
    case = facts.worst_case
    return "" if case is None else f"{number(case.max_abs)} of {case.tolerance.max_abs:g}"


def _case(facts: Facts) -> str:
    return "" if facts.worst_case is None else facts.worst_case.name


def _top1(facts: Facts) -> str:
    shares = [case.top1 for case in facts.cases if case.top1 is not None]
    return f"{100 * min(shares):.2f}%" if shares else ""


def _kl(facts: Facts) -> str:
    divergences = [case.mean_kl for case in facts.cases if case.mean_kl is not None]
    return number(max(divergences)) if divergences else ""


def _retained(facts: Facts) -> str:
    return ", ".join(f"{100 * entry.retained:.1f}%" for entry in facts.fidelity.values())


def _gates(facts: Facts) -> str:
    context = facts.manifest.context
    if context is None:
        return ""
    taus = sorted({gate.tau for gate in context.gates if gate.tau is not None})
    return f"{len(context.gates)}" + (f", tau {taus[0]:g} to {taus[-1]:g}" if taus else "")


def _weights_file(facts: Facts) -> str:
    largest = next(iter(facts.outputs.items()))
    return f"{largest[0]}, {size(largest[1])}"


def _base_hash(facts: Facts) -> str:
    spec = facts.manifest.recipe["base"]
    return next((i.sha256[:12] for i in facts.manifest.inputs if i.spec == spec), "")


def _versions(facts: Facts) -> str:
    installed, names = facts.manifest.versions, ("onnxruntime", "torch", "peft")
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


FIGURES: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("verdict", lambda f: f.manifest.parity.verdict),
    ("target", lambda f: f.target),
    ("precision", lambda f: f.manifest.precision),
    ("graph from", lambda f: f.manifest.frontend or ""),
    ("size", lambda f: size(f.total_bytes)),
    ("largest file", _weights_file),
    ("base, first file's sha256", _base_hash),
    ("adapters", lambda f: ", ".join(f.adapters)),
    ("adapted sites", lambda f: str(len(f.manifest.sites))),
    ("cases", lambda f: str(len(f.cases)) if f.report else ""),
    ("largest difference", _worst),
    ("in case", _case),
    ("largest mean KL", _kl),
    ("least top-1", _top1),
    ("retained", _retained),
    ("gates", _gates),
    ("versions", _versions),
)


def compared(artifacts: Sequence[Facts]) -> Sheet:
    """Every figure that at least one of the artifacts has."""
    rows = ((title, *(of(facts) for facts in artifacts)) for title, of in FIGURES)
    filled = tuple(row for row in rows if any(row[1:]))
    return Sheet("Figures", ("figure", *(facts.name for facts in artifacts)), filled)


def compared_table(artifacts: Sequence[Facts]) -> Table:
    """`compared` for a terminal; what differs stands out."""
    from rich.table import Table
    from rich.text import Text

    sheet = compared(artifacts)
    shown = Table(title_justify="left")
    for heading in sheet.headings:
        shown.add_column(Text(heading), overflow="fold")
    for title, *values in sheet.rows:
        style = "bold" if len(set(values)) > 1 else ""
        shown.add_row(Text(title), *(Text(value, style=style) for value in values))
    return shown


def compared_json(artifacts: Sequence[Facts]) -> dict[str, Any]:
    """The figures as numbers, for scripts."""
    return {
        "artifacts": [
            {
                "name": facts.name,
                "target": facts.target,
                "precision": facts.manifest.precision,
                "verdict": facts.manifest.parity.verdict,
                "bytes": facts.total_bytes,
                "adapters": facts.adapters,
                "sites": len(facts.manifest.sites),
                "cases": len(facts.cases),
                "worst_case": None if facts.worst_case is None else facts.worst_case.as_dict(),
                "worst_share_of_bound": None
                if facts.worst_case is None
                else bound_share(facts.worst_case),
                "retained": {name: entry.retained for name, entry in facts.fidelity.items()},
            }
            for facts in artifacts
        ]
    }
