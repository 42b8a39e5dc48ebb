"""Command `compare`: several artifacts side by side."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Put artifacts side by side.",
    epilog=examples(
        "compare build/smollm2-pydoc build/smollm2-pydoc-context",
        "compare build/a build/b build/c --out compared.html --open",
    ),
)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write a page to this file, too.")
@click.option("--open", "show", is_flag=True, help="Show the page in the browser.")
@shared_options
def compare(artifacts: tuple[Path, ...], out: Path | None, show: bool, as_json: bool) -> None:
    """Compare ARTIFACTS by their manifests and reports: sizes, proof, what was retained."""
    import tempfile

    from adaptrix_export.show import terminal
    from adaptrix_export.show.compare import compared, compared_json, compared_table
    from adaptrix_export.show.facts import read_facts
    from adaptrix_export.show.page import compare_page
    from adaptrix_export.show.write import open_page, write_page

    if len(artifacts) < 2:
        raise click.UsageError("compare needs two artifacts or more.")
    facts = [read_facts(folder) for folder in artifacts]
    if as_json:
        failures.print_json(compared_json(facts))
    else:
        terminal.show(compared_table(facts))
    if out is None and not show:
        return
    out = out or Path(tempfile.mkdtemp(prefix="adaptrix-compare-")) / "compared.html"
    page = write_page(compare_page([f.name for f in facts], compared(facts), facts), out)
    click.echo(str(page), err=as_json)
    if show and not open_page(page):
        click.echo("note: no browser was found; open the file by hand", err=True)
