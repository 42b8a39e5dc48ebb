"""Command `pull`: an artifact from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Fetch an artifact from the hub.",
    epilog=examples("pull hf:org/name ./artifact", "pull hf:org/name@revision ./artifact"),
)
@click.argument("source", metavar="hf:ORG/NAME[@REVISION]")
@click.argument("out", type=click.Path(path_type=Path))
@shared_options
def pull(source: str, out: Path, as_json: bool) -> None:
    """Fetch an artifact that `push` sent into the new folder OUT, each byte checked."""
    from adaptrix_export.manage.hub import pull as fetch
    from adaptrix_export.show.terminal import progress

    with progress() as telling:
        manifest = fetch(source, out, telling)
    if as_json:
        failures.print_json({"out": str(out), "files": len(manifest.outputs) + 1})
        return
    click.echo(f"pulled {len(manifest.outputs) + 1} files to {out}")
