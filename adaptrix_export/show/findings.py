"""What `validate` found, as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adaptrix_export.manage.findings import ERROR, OK, WARNING, Finding, Validation

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {OK: "green", WARNING: "yellow", ERROR: "red"}


def table(validation: Validation) -> Table:
    """One row a kind of finding, in the order of the checks; see `grouped`."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(f"adapters on {validation.base}"), title_justify="left")
    for heading in ("result", "check", "place", "found", "expected", "remedy"):
        shown.add_column(heading, overflow="fold")
    for finding, place in grouped(validation):
        cells = (finding.check, place, finding.found, finding.expected, finding.remedy)
        shown.add_row(
            Text(finding.severity, _STYLES[finding.severity]),
            *(Text(_printable(cell)) for cell in cells),  # Text: names from files are not markup
        )
    return shown


def grouped(validation: Validation) -> list[tuple[Finding, str]]:
    """Findings of one adapter that differ in their places alone are one line, with a count.

    `--json` has every place.
    """
    places: dict[tuple[str, Finding], list[str]] = {}
    for name, finding in validation.findings:
        place = finding.place if finding.place.startswith(name) else f"{name}: {finding.place}"
        places.setdefault((name, replace(finding, place="")), []).append(place)
    return [(finding, _listed(names)) for (_, finding), names in places.items()]


def _listed(places: list[str]) -> str:
    first, *others = places
    return f"{first} and {len(others)} more" if others else first


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
