"""Command `drift`: how far adapters move a base, site by site, and a tau for clamping it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Measure how far adapters move the base.",
    epilog=examples(
        "drift ./base ./lora",
        "drift ./base ./lora --share 0.99 --text my-domain.txt",
        "drift ./base ./lora --scope layer --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--share", default=0.9, show_default=True, type=click.FloatRange(0, 1),
    help="Share of tokens that the proposed tau never clamps.",
)  # fmt: skip
@click.option(
    "--scope", default="site", show_default=True, type=click.Choice(["site", "layer"]),
    help="Whether tau is for each site, or a budget of each layer.",
)  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on (UTF-8).")
@shared_options
def drift(
    base: str,
    adapters: tuple[str, ...],
    share: float,
    scope: str,
    text: Path | None,
    as_json: bool,
) -> None:
    """Measure |d| / |y0| at every site: what each ADAPTER adds beside the BASE's own output.

    Prints a line a site and proposes a tau for `context: {mode: clamp}`. Measured on text from the
    standard library's documentation unless --text names some; nothing is clamped meanwhile.
    """
    from adaptrix_export.load import open_adapter
    from adaptrix_export.load.fit.invariants import verify
    from adaptrix_export.load.fit.mismatch import fitted
    from adaptrix_export.load.open_base import open_base
    from adaptrix_export.load.text import read_text
    from adaptrix_export.measure.drift import measure
    from adaptrix_export.plan import Plan
    from adaptrix_export.show.terminal import progress

    opened = open_base(base, adapters=adapters)
    found_adapters = tuple(open_adapter(adapter, opened) for adapter in adapters)
    plan = verify(fitted(Plan(opened, found_adapters), "error"))
    with progress() as telling:
        measured = measure(plan, telling, read_text(text, "--text") if text else None)
    report = measured.as_dict(share, scope)
    if as_json:
        failures.print_json(report)
        return
    _show(report)
    chosen = f"{100 * share:g}% of {report['tokens']} tokens"
    click.echo(f"tau {report['tau']:g} clamps no site for {chosen}")


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from adaptrix_export.show.terminal import show

    shown = Table(title=f"|d| / |y0| over {report['tokens']} tokens ({report['text']})")
    shown.add_column("site")
    for heading in ("median", f"{100 * report['share']:g}%", "max"):
        shown.add_column(heading, justify="right")
    for line in report["sites"]:
        shown.add_row(line["site"], *(f"{line[key]:.3g}" for key in ("median", "quantile", "max")))
    show(shown)
