"""Every error that a user can meet, in one tree; `cli.py` catches the root, once.

    AdaptrixError
    ├── InputError            exit 2   what was given cannot be used
    │   ├── RecipeError                a recipe or flag is wrong
    │   ├── SourceError                a base or adapter is missing, damaged or unreadable
    │   ├── AdapterError               an adapter does not fit its base
    │   ├── UnsupportedError           understood, and refused by name
    │   └── OutputError                the output place cannot be used
    ├── ProofError            exit 1   a check failed; nothing was published
    │   ├── ParityError
    │   ├── FidelityError              a redistribution kept less than was asked for
    │   └── VerificationError          a published artifact no longer is what its manifest says
    └── MachineError          exit 3   the machine failed us: disk full, out of memory, a crash

Each message is one line: place, what was found, what was expected, and what to do.
"""

from __future__ import annotations

from typing import Any


class AdaptrixError(Exception):
    """Root. `place: found, expected ...; remedy`, with the parts kept for `--json`."""

    exit_code = 1

    def __init__(self, place: str, found: str, expected: str = "", remedy: str = "") -> None:
        self.place, self.found, self.expected, self.remedy = place, found, expected, remedy
        text = f"{place}: {found}"
        if expected:
            text += f", expected {expected}"
        if remedy:
            text += f"; {remedy}"
        super().__init__(" ".join(text.split()))

    def as_dict(self) -> dict[str, str]:
        """The parts by name, for scripts."""
        return {
            "error": type(self).__name__,
            "place": self.place,
            "found": self.found,
            "expected": self.expected,
            "remedy": self.remedy,
        }


class InputError(AdaptrixError):
    exit_code = 2


class RecipeError(InputError):
    pass


class SourceError(InputError):
    pass


class AdapterError(InputError):
    pass


class UnsupportedError(InputError):
    pass


class OutputError(InputError):
    pass


class ProofError(AdaptrixError):
    exit_code = 1


class ParityError(ProofError):
    """`report` is the whole parity report, when there is one."""

    report: dict[str, Any] | None = None


class FidelityError(ProofError):
    """`report` holds what was measured."""

    report: dict[str, Any] | None = None


class VerificationError(ProofError):
    pass


class MachineError(AdaptrixError):
    exit_code = 3
