"""From any exception to what the user sees: one line or one JSON document, and an exit code."""

from __future__ import annotations

import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import click

from adaptrix_export.errors import AdaptrixError, MachineError

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended

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

# How libraries say it in errors of their own: torch's allocator, C++ below ONNX Runtime.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "Failed to allocate memory")

# What only the compiler imports, by the name of its module: an installation that just runs
# artifacts is without it.
_COMPILER = (
    "accelerate filelock gguf huggingface_hub ml_dtypes mobius onnx onnx_ir optimum peft pydantic "
    "regex safetensors threadpoolctl torch transformers yaml"
).split()


def report(error: BaseException, as_json: bool, verbose: bool) -> int:
    """Print the failure and give its exit code. Nothing was published."""
    failure = known(error)
    if verbose and failure is not error:
        traceback.print_exception(error, file=sys.stderr)
    failure = failure or _internal(error)
    if as_json:
        document: dict[str, Any] = {**failure.as_dict(), "message": str(failure)}
        document["exit_code"] = failure.exit_code
        if failure.report is not None:
            document["report"] = failure.report
        written = _written(lambda: print_json(document))
    else:
        measured = failure.report
        written = measured is None or _written(lambda: print_table(measured))
    if not (as_json and written):
        _written(lambda: click.echo(f"error: {_one_line(failure)}", err=True))
    return failure.exit_code


def _written(write: Callable[[], None]) -> bool:
    """Whether the output could be written; a full disk under stdout must not hide the failure."""
    try:
        write()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader of our output went away: click ends quietly
        return False
    return True


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(_finite(document), indent=2))


def print_table(report: Mapping[str, Any]) -> None:
    """A report's tables on stdout: what a redistribution and gates kept, parity, and gates."""
    from adaptrix_export.show.fidelity_tables import effect_table, fidelity_table
    from adaptrix_export.show.parity_tables import gates_table, table
    from adaptrix_export.show.terminal import show

    for name, told in report.get("fidelity", {}).items():
        show(fidelity_table(name, told))
    if "effect" in report:
        show(effect_table(report["effect"]))
    if "cases" not in report:
        return
    show(table(report))
    gates = gates_table(report)
    if gates is not None:
        show(gates)


def known(error: BaseException) -> AdaptrixError | None:
    """The failure as one of ours, if it is one of ours or the machine's."""
    if isinstance(error, AdaptrixError):
        return error
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        found, remedy = _MACHINE[errno.ENOMEM]
        return MachineError("this machine", found, remedy=remedy)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        found, remedy = _MACHINE[error.errno]
        return MachineError(str(error.filename or "this machine"), found, remedy=remedy)
    if isinstance(error, ModuleNotFoundError):
        return _not_installed(str(error.name).partition(".")[0])
    return None


def _not_installed(module: str) -> MachineError | None:
    """A package that an extra of ours would have installed."""
    if module == "onnxruntime":
        extras = "adaptrix-export[runtime]"
    elif module in _COMPILER:
        extras = "adaptrix-export[cpu]"
    else:
        return None
    return MachineError(
        "this installation", f"no package {module}", "it, for this command",
        f"pip install '{extras}'",
    )  # fmt: skip


def _internal(error: BaseException) -> MachineError:
    """A fault of this program: it has the exit code of a crash."""
    found = f"{type(error).__name__}: {error}"
    return MachineError("internal error", found, remedy="run again with -v and report what it says")


def _one_line(error: AdaptrixError) -> str:
    """The message without control characters: names in it come from files of others."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
