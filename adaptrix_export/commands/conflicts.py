"""Command `conflicts`: how much adapters get in each other's way."""

from __future__ import annotations

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Show how adapters get in each other's way.",
    epilog=examples(
        "conflicts ./base ./a ./b",
        "conflicts hf:org/name@main ./a ./b ./c --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@shared_options
def conflicts(base: str, adapters: tuple[str, ...], as_json: bool) -> None:
    """Compare two or more ADAPTERs on a BASE, site by site; nothing is built.

    For each pair: the share of their changes that cancels when they are added (conflict), cosine,
    values with opposed signs, overlap of their output and input spaces.
    """
    from adaptrix_export.measure.conflicts import conflicts_between
    from adaptrix_export.package.documents import ConflictsEntry, parse_document
    from adaptrix_export.show.conflict_tables import pair_table, site_table
    from adaptrix_export.show.terminal import progress, show

    with progress() as telling:
        report = conflicts_between(base, adapters, telling)
    if as_json:
        failures.print_json(report)
        return
    document = parse_document(ConflictsEntry, report, "conflicts")
    show(pair_table(document))
    show(site_table(document))
