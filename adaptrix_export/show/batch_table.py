"""The table at the end of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptrix_export.manage.batch import Result

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("artifact", "state", "MB", "proof", "largest difference", "seconds")


def batch_table(results: Sequence[Result]) -> Table:
    """A line for each build: where, what became of it, its size, its proof, how long it took."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, overflow="fold", justify="right" if number > 1 else "left")
    for result in results:
        state, style = result.state, ""
        if result.error is not None:
            state, style = f"{result.error['place']}: {result.error['found']}", "red"
        table.add_row(
            Text(result.out),
            Text(state, style=style),
            f"{result.bytes / 1e6:,.1f}" if result.bytes else "",
            result.verdict,
            "" if result.worst is None else f"{result.worst:.1e}",
            f"{result.seconds:.1f}",
        )
    return table
