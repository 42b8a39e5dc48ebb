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

import errno
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The remedy for a name that is not known: the nearest one that is, else `otherwise`."""
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


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


# errno -> what ran out, and what to do about it.
_MACHINE = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another --out"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --out"),
    errno.ENOMEM: ("out of memory", "close other programs or use a larger machine"),
    errno.EFBIG: ("a file became larger than this system allows", "raise ulimit -f, or --out"),
    errno.EMFILE: ("too many open files", "raise ulimit -n"),
    errno.ENFILE: ("too many open files on this machine", "close other programs"),
    errno.EIO: ("the disk failed to read or write", "check the disk"),
}

# errno -> what is wrong with a path that somebody named.
_PATHS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENAMETOOLONG: "a name that is too long",
    errno.ELOOP: "a link to itself",
    errno.ENOTDIR: "a file where a folder should be",
    errno.EISDIR: "a folder where a file should be",
    errno.EROFS: "a file system that cannot be written",
    errno.ENXIO: "no file",
}

# How libraries say it in errors of their own: torch's allocator, C++ below ONNX Runtime.
_NO_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "std::bad_alloc",
    "Failed to allocate memory",
)

# What only the compiler imports, by the name of its module: an installation that just runs
# artifacts is without it.
_COMPILER = (
    "accelerate filelock gguf huggingface_hub ml_dtypes mobius onnx onnx_ir onnxscript "
    "peft pydantic regex safetensors threadpoolctl torch transformers yaml"
).split()


def known(error: BaseException) -> AdaptrixError | None:
    """The failure as one of ours, if it is one of ours or the machine's."""
    if isinstance(error, AdaptrixError):
        return error
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        shortage, remedy = _MACHINE[errno.ENOMEM]
        return MachineError("this machine", shortage, remedy=remedy)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        shortage, remedy = _MACHINE[error.errno]
        return MachineError(str(error.filename or "this machine"), shortage, remedy=remedy)
    if isinstance(error, OSError) and error.errno in _PATHS:
        return SourceError(
            str(error.filename or "a path"), _PATHS[error.errno], "one that can be used",
            "check the path, and who may read and write it",
        )  # fmt: skip
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return InputError("a path", "a NUL character in it", "a path", "check the spelling")
    if isinstance(error, ModuleNotFoundError):
        return _not_installed(str(error.name).partition(".")[0])
    return None


def _not_installed(module: str) -> MachineError | None:
    """A package that an extra of ours would have installed."""
    if module == "onnxruntime":
        extras = "adaptrix-export[runtime]"
    elif module in ("model_signing", "cryptography"):
        extras = "adaptrix-export[sign]"
    elif module in _COMPILER:
        extras = "adaptrix-export[cpu]"
    else:
        return None
    return MachineError(
        "this installation", f"no package {module}", "it, for this command",
        f"pip install '{extras}'",
    )  # fmt: skip
