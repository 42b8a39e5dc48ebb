"""The command line; a module of `commands` for each command.

Whatever goes wrong comes out of `Commands.invoke` as one line and an exit code: 0 done, 1 a proof
failed, 2 bad input or usage, 3 the machine failed, 130 interrupted. Heavy imports happen inside the
commands, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from io import TextIOWrapper
from typing import Any

import click

from adaptrix_export import __version__
from adaptrix_export.commands.add_adapter import add_adapter
from adaptrix_export.commands.batch import batch
from adaptrix_export.commands.build import build
from adaptrix_export.commands.compare import compare
from adaptrix_export.commands.completion import completion
from adaptrix_export.commands.conflicts import conflicts
from adaptrix_export.commands.convert import convert
from adaptrix_export.commands.drift import drift
from adaptrix_export.commands.inspect import inspect
from adaptrix_export.commands.options import AS_JSON, VERBOSITY, examples
from adaptrix_export.commands.pull import pull
from adaptrix_export.commands.push import push
from adaptrix_export.commands.redistribute import redistribute
from adaptrix_export.commands.report import report
from adaptrix_export.commands.run import run
from adaptrix_export.commands.schema import schema
from adaptrix_export.commands.sign import sign
from adaptrix_export.commands.validate import validate
from adaptrix_export.commands.verify import verify
from adaptrix_export.compat.ranges import outside_ranges
from adaptrix_export.show import failures


class Commands(click.Group):
    """The one place where errors are caught."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own way of ending a command
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was published", err=True)
            raise click.exceptions.Exit(failures.INTERRUPTED) from None
        except BaseException as error:
            # A panic of a library in Rust is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output went away: click ends quietly
            as_json, verbosity = ctx.meta.get(AS_JSON, False), ctx.meta.get(VERBOSITY, 0)
            code = failures.report(error, as_json, verbose=verbosity > 0)
            raise click.exceptions.Exit(code) from None


def _interrupt_on_sigterm() -> None:
    """A SIGTERM ends a command as Ctrl-C does: what it staged is removed."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # Only the main thread may set handlers; and one that was set by others, or ignored, stays.
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "build recipes/smollm2-pydoc.yaml",
        'run build/smollm2-pydoc --prompt "The with statement"',
    ),
)
@click.version_option(__version__, prog_name="adaptrix-export")
def main() -> None:
    """Merge PEFT adapters into a base transformer, prove the result, publish it."""
    _interrupt_on_sigterm()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    if line := outside_ranges():
        click.echo(f"note: {line}; going on", err=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries would draw over ours


COMMANDS = (
    build, batch, add_adapter, inspect, convert, redistribute, validate, conflicts, drift, verify,
    run, report, compare, push, pull, sign, schema, completion,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
