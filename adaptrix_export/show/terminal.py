"""What a person sees while work goes on: bars on a terminal, lines elsewhere; always on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import click

from adaptrix_export.progress import Advance, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress

PLAIN_WIDTH = 110  # columns of a table that goes to a file or a pipe

# Read by the libraries when they are imported, in a child process too.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def set_up_logging(verbosity: int) -> None:
    """0: errors only, and no chatter from libraries; 1: what happens; 2: everything."""
    level = (logging.ERROR, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after a fork otherwise
    if verbosity:
        return
    warnings.filterwarnings("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def progress() -> Iterator[Progress]:
    """A Progress for this terminal, or for a file or pipe."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    bars = _rich_bars()
    with bars:
        yield Bars(bars)


def show(renderable: RenderableType) -> None:
    """Print a table or text on stdout."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    console.print(renderable)


class Lines:
    """A line when a stage starts and one when it is done."""

    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Advance]:
        return self._stage(name, unit)

    @contextmanager
    def _stage(self, name: str, unit: str) -> Iterator[Advance]:
        done, start = 0, time.perf_counter()

        def advance(amount: int) -> None:
            nonlocal done
            done += amount

        click.echo(f"{name} ...", err=True)
        yield advance
        seconds = time.perf_counter() - start
        click.echo(f"{name}: {amount_of(done, None, unit)}{seconds:.1f} s", err=True)

    def note(self, text: str) -> None:
        click.echo(text, err=True)


class Bars:
    """A bar for each stage, through rich."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Advance]:
        return self._stage(name, total, unit)

    @contextmanager
    def _stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        task = self._bars.add_task(name, total=total, unit=unit)
        yield lambda amount: self._bars.advance(task, amount)
        done = self._bars.tasks[self._bars.task_ids.index(task)].completed
        self._bars.update(task, total=done or 1, completed=done or 1, unit=unit if done else None)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


def amount_of(done: float, total: float | None, unit: str | None) -> str:
    """`12/30 layers, ` or `538 MB, `; empty when nothing was counted."""
    if unit is None or not done:
        return ""
    if unit in ("B", "bytes"):
        done, total, unit = done / 1e6, None if total is None else total / 1e6, "MB"
    whole = "" if total is None or total == done else f"/{total:.0f}"
    return f"{done:.0f}{whole}{' ' if unit else ''}{unit}, "


def _rich_bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            amount = amount_of(task.completed, task.total, task.fields["unit"])
            return Text(amount.removesuffix(", "))

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        Amount(),
        console=Console(stderr=True),
        redirect_stdout=False,  # stdout carries the result, a JSON document perhaps
    )
