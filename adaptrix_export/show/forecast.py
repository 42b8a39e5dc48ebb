"""A forecast as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrix_export.manage.forecast import Forecast

if TYPE_CHECKING:
    from rich.console import RenderableType


def rendered(forecast: Forecast) -> RenderableType:
    """What would be read, then what would be done."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    reads = Table(title="would read", title_justify="left")
    for heading in ("source", "file"):
        reads.add_column(heading, overflow="fold")
    reads.add_column("MB", justify="right")
    for source in forecast.reads:
        reads.add_row(Text(source.source), Text(source.file), _megabytes(source.bytes))
    does = Table(title="would do", title_justify="left", show_header=False)
    does.add_column()
    does.add_column(overflow="fold")
    modules = ", ".join(f"{name} x{count}" for name, count in forecast.changed.items())
    does.add_row("change", f"{forecast.changed_tensors} of {forecast.tensors} tensors: {modules}")
    does.add_row("passes", ", ".join(forecast.passes) or "none")
    room = f"{forecast.free_bytes / 1e9:,.1f} GB free{'' if forecast.fits else ': NOT ENOUGH'}"
    size = _megabytes(forecast.writes_bytes)
    does.add_row("write", f"about {size} MB to {forecast.out} ({room})")
    does.add_row("target", forecast.target)
    does.add_row("proof", forecast.parity)
    does.add_row("memory", f"about {_megabytes(forecast.memory_bytes)} MB")
    does.add_row("time", f"about {forecast.seconds:.0f} s on two cores, without the passes")
    return Group(reads, does)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
