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
        └── CheckerError               the checking process crashed, was killed or was too late

Each message is one line: place, what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class AdaptrixError(Exception):
    """Root. `place: found, expected ...; remedy`, with the parts kept for `--json`."""

    exit_code = 1
    # What was measured before it failed, where something was; for `--json` and the tables.
    report: Mapping[str, Any] | None = None

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


class FidelityError(ProofError):
    """`report` holds what was measured."""


class VerificationError(ProofError):
    pass


class MachineError(AdaptrixError):
    exit_code = 3


class CheckerError(MachineError):
    """`crashed` where the code of a library did it (a segmentation fault), not the machine."""

    crashed = False
