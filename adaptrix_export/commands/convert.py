"""Command `convert`: an adapter in another format."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Write an adapter in another format.",
    epilog=examples(
        "convert ./mlx-adapter --base ./base --to peft --out ./lora",
        "convert ./lora --base ./base --to adaptrix --out ./folder",
        "convert ./folder --base ./base --to peft --out ./lora --adaptrix-scaling stored",
    ),
)
@click.argument("source", metavar="SRC")
@click.option("--base", required=True, metavar="SOURCE", help="The model it was trained on.")
@click.option("--to", "to", required=True, type=click.Choice(["peft", "adaptrix"]))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin.")
@click.option(
    "--adaptrix-scaling", default="alpha_over_rank", show_default=True,
    type=click.Choice(["alpha_over_rank", "stored", "one"]),
    help="The scale of an original Adaptrix folder.",
)  # fmt: skip
@shared_options
def convert(
    source: str, base: str, to: str, out: Path, allow_pickle: bool, adaptrix_scaling: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the adapter SRC, of any format, as a PEFT or an Adaptrix folder.

    The base says which modules the adapter's names mean. What was written is read again and
    compared bit by bit before it is put in place.
    """
    from adaptrix_export.load import Reading
    from adaptrix_export.manage.convert import convert as write

    done = write(source, base, to, out, Reading(allow_pickle, adaptrix_scaling))
    if as_json:
        failures.print_json({"out": str(done.out), "to": to, "notes": done.notes})
        return
    for note in done.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {done.out}")
