"""What `validate` found, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from adaptrix_export.errors import AdaptrixError

if TYPE_CHECKING:
    from rich.table import Table

OK, WARNING, ERROR = "ok", "warning", "error"
FAILED = 2  # the exit code of bad input
_STYLES = {OK: "green", WARNING: "yellow", ERROR: "red"}


@dataclass(frozen=True)
class Finding:
    """One row: what a check found at one place, what it expected, and what to do about it."""

    severity: str
    check: str
    place: str
    found: str
    expected: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: AdaptrixError, check: str) -> Finding:
        """An error that would stop a build, as a row."""
        return cls(ERROR, check, error.place, error.found, error.expected, error.remedy)


@dataclass(frozen=True)
class Validation:
    """All rows, by the name of the adapter that they are about."""

    base: str
    findings: tuple[tuple[str, Finding], ...]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for _, finding in self.findings)

    def exit_code(self, strict: bool = False) -> int:
        """0, or 2 with errors; `strict` counts warnings as errors."""
        return FAILED if self.count(ERROR) or (strict and self.count(WARNING)) else 0

    def summary(self) -> str:
        return f"{self.count(ERROR)} errors, {self.count(WARNING)} warnings"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "base": self.base,
            "errors": self.count(ERROR),
            "warnings": self.count(WARNING),
            "findings": [{"adapter": name, **asdict(found)} for name, found in self.findings],
        }


def table(validation: Validation) -> Table:
    """One row a finding, in the order of the checks."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(f"adapters on {validation.base}"), title_justify="left")
    for heading in ("result", "check", "place", "found", "expected", "remedy"):
        shown.add_column(heading, overflow="fold")
    for name, finding in validation.findings:
        place = finding.place if finding.place.startswith(name) else f"{name}: {finding.place}"
        cells = (finding.check, place, finding.found, finding.expected, finding.remedy)
        shown.add_row(
            Text(finding.severity, _STYLES[finding.severity]),
            *(Text(_printable(cell)) for cell in cells),  # Text: names from files are not markup
        )
    return shown


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
