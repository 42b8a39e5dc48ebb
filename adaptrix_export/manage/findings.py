"""What `validate` found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adaptrix_export.errors import AdaptrixError

OK, WARNING, ERROR = "ok", "warning", "error"
FAILED = 2  # the exit code of bad input


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
            "findings": [{"adapter": name, **asdict(finding)} for name, finding in self.findings],
        }
