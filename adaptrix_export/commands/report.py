"""Command `report`: the page of an artifact, with the timings of the build where it was made."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Show what an artifact is and how it was proved.",
    epilog=examples(
        "report build/smollm2-pydoc",
        "report build/smollm2-pydoc --open",
        "report build/smollm2-pydoc --out /tmp/page.html",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the page to this file.")
@click.option("--open", "show", is_flag=True, help="Show it in the browser.")
@shared_options
def report(artifact: Path, out: Path | None, show: bool, as_json: bool) -> None:
    """Write a page about a published ARTIFACT, one file that needs no network.

    Without --out it goes into a temporary folder. It is the report.html in the artifact, with the
    times of the build's stages if this machine built it.
    """
    import tempfile

    from adaptrix_export.show.facts import read_facts
    from adaptrix_export.show.page import report_page
    from adaptrix_export.show.timings import kept_timings
    from adaptrix_export.show.write import open_page, write_page

    facts = read_facts(artifact, kept_timings(artifact))
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="adaptrix-report-")) / f"{facts.name}.html"
    page = write_page(report_page(facts), out)
    shown = open_page(page) if show else False
    if as_json:
        failures.print_json({"page": str(page), "opened": shown})
        return
    click.echo(str(page))
    if show and not shown:
        click.echo("note: no browser was found; open the file by hand", err=True)
