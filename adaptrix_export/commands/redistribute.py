"""Command `redistribute`: an adapter moved onto a few layers."""

from __future__ import annotations

from typing import Any

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Move an adapter onto a few layers.",
    epilog=examples(
        "redistribute ./base ./lora --layers 5 --out ./lora-5",
        "redistribute ./base ./lora --layers 7,15,22 --strategy distill --out ./lora-3",
        "redistribute ./base ./lora --layers auto --calibration my.txt --min-retained 0.6 "
        "--out ./lora-auto",
        "redistribute ./base ./lora --layers search --max-sites 25 --out ./lora-25",
    ),
)
@click.argument("base")
@click.argument("adapter")
@click.option(
    "--layers", default="auto", show_default=True, metavar="auto|5|7,15,22|search",
    help="Which: n/4, n/2, 3n/4; so many, spread evenly; these; the best within a budget.",
)  # fmt: skip
@click.option("--out", required=True, metavar="DIR", help="A new folder.")
@click.option("--strategy", metavar="select|fold|fit|distill", help="Default fit.")
@click.option("--rank", type=int, help="Of what is computed for a site.")
@click.option("--calibration", metavar="FILE|self|pydoc", help="The text to fit and measure on.")
@click.option("--tokens", type=int, help="Of that text, to fit on; default 8192.")
@click.option("--seed", type=int, help="For whatever is drawn.")
@click.option("--steps", type=int, help="Training steps of distill.")
@click.option("--max-sites", type=int, help="The budget of --layers search.")
@click.option("--max-bytes", type=int, help="The same in bytes.")
@click.option("--max-memory", type=int, help="Bytes for weights; else read layer by layer.")
@click.option("--min-retained", type=float, metavar="SHARE", help="Fail below this, 0 to 1.")
@click.option("--parity", metavar="full|fast|off", help="How much to prove before publishing.")
@shared_options
def redistribute(
    base: str, adapter: str, out: str, as_json: bool, parity: str | None, **options: Any
) -> None:
    """Move the deltas of ADAPTER onto a few layers of BASE and write them as a PEFT folder.

    What that lost is measured on text that was not fitted on, and always printed. PEFT and every
    target of `build` read the result.
    """
    from adaptrix_export.recipe import make_recipe
    from adaptrix_export.show.terminal import progress

    calibration = {"calibration": "text", "tokens": "tokens", "seed": "seed"}
    flags: dict[str, Any] = {"base": base, "adapters": [adapter], "target": "peft", "out": out}
    for name, value in options.items():
        if value is not None:
            key = f"calibration.{calibration[name]}" if name in calibration else name
            flags[f"redistribute.{key}"] = value
    if parity is not None:
        flags["parity.level"] = parity
    parsed = make_recipe({}, "redistribute", flags)

    from adaptrix_export import pipeline  # torch and the rest, once the options are good

    with progress() as telling:
        outcome = pipeline.build(parsed, telling)
    if as_json:
        failures.print_json(
            {
                "out": str(outcome.out),
                "fidelity": outcome.manifest["fidelity"],
                "report": outcome.report,
                "notes": outcome.notes,
            }
        )
        return
    failures.print_table(outcome.report or {"fidelity": outcome.manifest["fidelity"]})
    for note in outcome.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {outcome.out}")
