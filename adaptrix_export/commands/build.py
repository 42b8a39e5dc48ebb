"""Command `build`: a recipe in, a proved artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptrix_export.arch.task_table import TASKS
from adaptrix_export.commands.options import examples, shared_options, word_option
from adaptrix_export.show import failures

if TYPE_CHECKING:
    from adaptrix_export.recipe import Recipe


@click.command(
    short_help="Build and publish an artifact.",
    epilog=examples(
        "build recipes/smollm2-pydoc.yaml",
        "build --base ./base --adapter ./lora --target onnx --out ./merged",
        "build recipe.yaml --out ./other --set parity.decode_steps=64",
        "build recipe.yaml --dry-run",
        "build --base ./base --adapter ./lora --target onnx --tau 0.25 --out ./clamped",
        "build --base ./base --adapter ./a --adapter ./b --target onnx --out ./ab "
        "--compose ties --weight a=0.7",
        "build --base ./base --adapter ./a --adapter ./b --target onnx-switchable --out ./many",
        "build --base hf:org/name@main --adapter ./lora --target safetensors --out ./merged",
    ),
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path), metavar="[RECIPE.yaml]")
@click.option("--base", metavar="SOURCE", help="Folder, .gguf, hf:org/name@revision, package:P/F.")
@click.option("--adapter", "adapters", multiple=True, metavar="SOURCE", help="May be repeated.")
@word_option("--target", "onnx|onnx-switchable|safetensors|peft", "What to make.")
@click.option(
    "--rows", is_flag=True, default=None, help="onnx-switchable: an adapter for each row."
)
@click.option(
    "--approximate", "slots", metavar="svd:RANK",
    help="onnx-switchable: what is not plain LoRA as the nearest one.",
)  # fmt: skip
@click.option("--out", metavar="DIR", help="The folder to publish; it must not exist yet.")
@word_option("--frontend", "auto|native|traced", "What draws the base's graph.")
@word_option("--task", "|".join(("auto", *TASKS)), "What the model is for.")
@word_option("--pooling", "none|auto|mean|cls|lasttoken|...", "One vector a text, for encoders.")
@word_option("--layout", "hub|flat", "Where the graphs lie in the folder.")
@click.option("--provider", metavar="cpu", help="Execution provider that the graph is made for.")
@word_option("--precision", "auto|fp32|fp16|bf16|int8|int4", "Number format of the weights.")
@word_option("--base-weights", "auto|dequantized|original", "Of a quantized base, which.")
@word_option("--simulate", "nf4|nf4-double", "Quantize a plain base and back first.")
@click.option("--original-base", metavar="SOURCE", help="The unquantized model of a quantized one.")
@click.option("--allow-pickle", is_flag=True, default=None, help="Read adapter_model.bin.")
@click.option(
    "--adaptrix-scaling", metavar="alpha_over_rank|stored|one",
    help="The scale of an original Adaptrix folder.",
)  # fmt: skip
@click.option(
    "--portable", is_flag=True, default=None,
    help="safetensors: a config that transformers 4 reads, too.",
)  # fmt: skip
@word_option("--layers", "auto|5|7,15,22", "Move the adapters onto these layers.")
@word_option("--strategy", "select|fold|fit|distill", "How they are moved there.")
@click.option("--compose", metavar="METHOD", help="How several adapters become one.")
@click.option(
    "--weight", "weights", multiple=True, metavar="NAME=W", help="Of an adapter, by its name."
)
@word_option("--parity", "full|fast|off", "How much to prove before publishing.")
@word_option("--on-mismatch", "error|drop", "For sites that do not fit the base.")
@click.option(
    "--report/--no-report", default=None, help="Whether report.html is written; by default it is."
)
@click.option("--tau", metavar="NUMBER|calibrated", help="Clamp every site: context.tau.")
@click.option(
    "--dry-run", is_flag=True,
    help="Say what would be read, changed and written, with estimates, and stop.",
)  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of a recipe.")
@shared_options
def build(
    recipe: Path | None, settings: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Build an artifact from a RECIPE, from flags, or from both; flags win.

    It is written beside --out, compared with PyTorch and PEFT, and put in place only if it agrees.
    """
    from adaptrix_export.recipe import make_recipe, read_document
    from adaptrix_export.show.terminal import progress, show

    dotted = {
        "parity": "parity.level",
        "layers": "redistribute.layers",
        "strategy": "redistribute.strategy",
        "compose": "compose.method",
        "weights": "compose.weights",
        "tau": "context.tau",
    }
    chosen = {name: value for name, value in options.items() if value not in (None, ())}
    if "weights" in chosen:
        chosen["weights"] = dict(_weight(text) for text in chosen["weights"])
    if "slots" in chosen:
        chosen["slots"] = _approximation(chosen["slots"])
    flags = {dotted.get(name, name): value for name, value in chosen.items()}
    document = read_document(recipe) if recipe else {}
    parsed = make_recipe(document, str(recipe or "build"), flags, settings)

    from adaptrix_export import pipeline  # torch and the rest, once the recipe is known to be good
    from adaptrix_export.show.timings import Timed, keep_timings, timings_table

    if dry_run:
        _dry_run(parsed, as_json)
        return
    with progress() as telling:
        timed = Timed(telling)
        outcome = pipeline.build(parsed, timed)
    timings = timed.as_dict()
    keep_timings(outcome.out, timings)
    if as_json:
        failures.print_json(
            {
                "out": str(outcome.out),
                "report": outcome.report,
                "manifest": outcome.manifest,
                "notes": outcome.notes,
                "timings": timings,
                **outcome.measured,
            }
        )
        return
    if "conflicts" in outcome.measured:
        from adaptrix_export.package.documents import ConflictsEntry, parse_document
        from adaptrix_export.show.conflict_tables import pair_table

        conflicts = outcome.measured["conflicts"]
        show(pair_table(parse_document(ConflictsEntry, conflicts, "conflicts")))
    if "choice" in outcome.measured:
        click.echo(f"compose: auto chose {outcome.manifest['history'][-1]}")
    if outcome.report is None:
        failures.print_table({"fidelity": outcome.manifest.get("fidelity", {})})
        click.echo("UNVERIFIED: parity was off; the manifest says so, too")
    else:
        failures.print_table(outcome.report)
    show(timings_table(timings))
    for note in outcome.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {outcome.out}")


def _dry_run(recipe: Recipe, as_json: bool) -> None:
    """The forecast of a recipe; what opening and the target refuse is raised as in a build."""
    from adaptrix_export import pipeline
    from adaptrix_export.load.fit.invariants import verify
    from adaptrix_export.manage.forecast import forecast
    from adaptrix_export.show.forecast import rendered
    from adaptrix_export.show.terminal import progress, show

    with progress() as telling:
        expected = forecast(recipe, verify(pipeline.open_plan(recipe)), telling)
    if as_json:
        failures.print_json(expected.as_dict())
    else:
        show(rendered(expected))


def _weight(text: str) -> tuple[str, float]:
    """`name=0.7` apart."""
    name, equals, weight = text.rpartition("=")
    try:
        number = float(weight) if name and equals else None
    except ValueError:
        number = None
    if number is None:
        raise click.BadParameter(f"{text!r} is not NAME=W, W a number", param_hint="--weight")
    return name, number


def _approximation(text: str) -> dict[str, object]:
    """`svd:32` apart."""
    method, _, rank = text.partition(":")
    if not rank.isdecimal():
        raise click.BadParameter(f"{text!r} is not svd:RANK", param_hint="--approximate")
    return {"approximate": method, "rank": int(rank)}
