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

from adaptrix_export import errors
from adaptrix_export.errors import AdaptrixError, MachineError

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def report(error: BaseException, as_json: bool, verbose: bool) -> int:
    """Print the failure and give its exit code. Nothing was published."""
    failure = errors.known(error)
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
        written = measured is None or _written(lambda: _print_measured(measured))
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


def _print_measured(report: Mapping[str, Any]) -> None:
    """The tables of a failure's report; one that has none must not hide the failure."""
    try:
        print_table(report)
    except AdaptrixError as error:
        click.echo(f"note: no table of what was measured: {_one_line(error)}", err=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(_finite(document), indent=2))


def print_table(report: Mapping[str, Any]) -> None:
    """A report's tables on stdout: what a redistribution and gates kept, parity, and gates."""
    from adaptrix_export.package.documents import (
        EffectEntry,
        FidelityEntry,
        ReportDocument,
        parse_document,
    )
    from adaptrix_export.show.fidelity_tables import effect_table, fidelity_table
    from adaptrix_export.show.parity_tables import gates_table, table
    from adaptrix_export.show.terminal import show

    for name, figures in report.get("fidelity", {}).items():
        show(fidelity_table(name, parse_document(FidelityEntry, figures, f"fidelity of {name}")))
    if "effect" in report:
        show(effect_table(parse_document(EffectEntry, report["effect"], "effect")))
    if "cases" not in report:
        return
    document = ReportDocument.of(report)
    show(table(document))
    gates = gates_table(document)
    if gates is not None:
        show(gates)


def _internal(error: BaseException) -> MachineError:
    """A fault of this program: it has the exit code of a crash."""
    what = f"{type(error).__name__}: {error}"
    return MachineError("internal error", what, remedy="run again with -v and report what it says")


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
