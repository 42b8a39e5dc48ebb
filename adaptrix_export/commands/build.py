"""Command `build`: a recipe in, a proved artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptrix_export import failures
from adaptrix_export.commands.options import examples, shared_options


@click.command(
    short_help="Build and publish an artifact.",
    epilog=examples(
        "build recipes/smollm2-pydoc.yaml",
        "build --base ./base --adapter ./lora --target onnx --out ./merged",
        "build recipe.yaml --out ./other --set parity.decode_steps=64",
        "build --base hf:org/name@main --adapter ./lora --target safetensors --out ./merged",
    ),
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path), metavar="[RECIPE.yaml]")
@click.option("--base", metavar="SOURCE", help="Folder, .gguf, hf:org/name@revision, package:P/F.")
@click.option("--adapter", "adapters", multiple=True, metavar="SOURCE", help="May be repeated.")
@click.option("--target", metavar="onnx|safetensors", help="What to make.")
@click.option("--out", metavar="DIR", help="The folder to publish; it must not exist yet.")
@click.option("--frontend", metavar="auto|native", help="What draws the base's graph.")
@click.option(
    "--task",
    metavar="auto|text-generation|feature-extraction|text-classification|token-classification",
    help="What the model is for.",
)
@click.option("--provider", metavar="cpu", help="Execution provider that the graph is made for.")
@click.option("--precision", metavar="auto|fp32", help="Number format of the weights.")
@click.option(
    "--base-weights", metavar="auto|dequantized|original", help="Of a quantized base, which."
)
@click.option("--simulate", metavar="nf4|nf4-double", help="Quantize a plain base and back first.")
@click.option("--original-base", metavar="SOURCE", help="The unquantized model of a quantized one.")
@click.option("--allow-pickle", is_flag=True, default=None, help="Read adapter_model.bin.")
@click.option(
    "--adaptrix-scaling", metavar="alpha_over_rank|stored|one",
    help="The scale of an original Adaptrix folder.",
)  # fmt: skip
@click.option("--parity", metavar="full|fast|off", help="How much to prove before publishing.")
@click.option("--on-mismatch", metavar="error|drop", help="For sites that do not fit the base.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of a recipe.")
@shared_options
def build(recipe: Path | None, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Build an artifact from a RECIPE, from flags, or from both; flags win.

    It is written beside --out, compared with PyTorch and PEFT, and put in place only if it agrees.
    """
    from adaptrix_export.recipe import make_recipe, read_document
    from adaptrix_export.terminal import progress

    dotted = {"parity": "parity.level"}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    flags = {dotted.get(name, name): value for name, value in given.items()}
    document = read_document(recipe) if recipe else {}
    wanted = make_recipe(document, str(recipe or "build"), flags, settings)

    from adaptrix_export import pipeline  # torch and the rest, once the recipe is known to be good

    with progress() as telling:
        outcome = pipeline.build(wanted, telling)
    if as_json:
        failures.print_json(
            {
                "out": str(outcome.out),
                "report": outcome.report,
                "manifest": outcome.manifest,
                "notes": outcome.notes,
            }
        )
        return
    if outcome.report is None:
        click.echo("UNVERIFIED: parity was off; the manifest says so, too")
    else:
        failures.print_table(outcome.report)
    for note in outcome.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {outcome.out}")
