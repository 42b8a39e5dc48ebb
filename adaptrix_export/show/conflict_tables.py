"""The conflict report for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrix_export.package.documents import ConflictsEntry, PairConflict

if TYPE_CHECKING:
    from rich.table import Table

WORST = 10  # parameters that are listed


def pair_table(report: ConflictsEntry) -> Table:
    """One row a pair of adapters, over all parameters."""
    title = "conflicts: 0 none, about 0.29 for unrelated adapters of one size, 1 all cancels"
    shown = _table(title, "adapters", "conflict", "cosine", "signs differ", "overlap out / in")
    shown.add_column("shared sites", justify="right")
    for pair in report.pairs:
        shown.add_row(
            _names(pair),
            f"{pair.conflict:.3f}",
            f"{pair.cosine:+.3f}",
            f"{100 * pair.sign_disagreement:.1f}%",
            f"{_part(pair.overlap_out)} / {_part(pair.overlap_in)}",
            f"{pair.shared_sites} ({100 * pair.shared_energy:.0f}% of energy)",
        )
    return shown


def site_table(report: ConflictsEntry) -> Table:
    """The parameters where most cancels."""
    rows = [(pair, site) for site in report.sites for pair in site.pairs]
    rows.sort(key=lambda row: (-row[0].cancelled, row[1].site))
    title = f"where most cancels ({min(WORST, len(rows))} of {len(rows)})"
    shown = _table(title, "adapters", "cancelled", "cosine", "signs differ", "overlap out / in")
    shown.add_column("parameter")
    for pair, site in rows[:WORST]:
        shown.add_row(
            _names(pair),
            f"{pair.cancelled:.3f}",
            f"{pair.cosine:+.3f}",
            f"{100 * pair.sign_disagreement:.1f}%",
            f"{_part(pair.overlap_out)} / {_part(pair.overlap_in)}",
            site.site,
        )
    return shown


def _table(title: str, first: str, *numbers: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _names(pair: PairConflict) -> str:
    from rich.markup import escape

    return escape(", ".join(pair.adapters))


def _part(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
