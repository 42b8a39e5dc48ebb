"""Command `add-adapter`: one more adapter for a switchable artifact."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    "add-adapter",
    short_help="Add an adapter to a switchable artifact.",
    epilog=examples(
        "add-adapter build/switchable ./third-lora",
        "add-adapter build/switchable ./third-lora --name sql --base ./base",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapter")
@click.option("--name", metavar="NAME", help="What to call it; by default its folder's name.")
@click.option("--base", metavar="SOURCE", help="Where the base is now, if it was moved.")
@click.option(
    "--parity", "level", default="full", show_default=True,
    type=click.Choice(["full", "fast", "off"]), help="How much to prove before it is added.",
)  # fmt: skip
@shared_options
def add_adapter(
    artifact: Path, adapter: str, name: str | None, base: str | None, level: str, as_json: bool
) -> None:
    """Add ADAPTER to ARTIFACT, a folder of target onnx-switchable, without building it again.

    The adapter is compared with its own PyTorch + PEFT model through the artifact's graph first.
    """
    from adaptrix_export.manage.add_adapter import add_adapter as add
    from adaptrix_export.show.terminal import progress
    from adaptrix_export.show.write import renew_page

    with progress() as telling:
        added = add(artifact, adapter, name, base, level, telling, renew_page)
    if as_json:
        document = {"name": added.name, "file": str(added.file), "report": added.report}
        failures.print_json({**document, "entry": added.entry})
        return
    if added.report is None:
        click.echo("UNVERIFIED: parity was off; the manifest says so, too")
    else:
        failures.print_table(added.report)
    click.echo(f"added {added.name}: {added.file}")
