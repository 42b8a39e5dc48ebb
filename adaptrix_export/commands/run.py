"""Command `run`: text from an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Generate text from an artifact.",
    epilog=examples(
        'run build/smollm2-pydoc --prompt "The with statement"',
        'run build/switchable --adapter sql --temperature 0.7 --seed 1 --prompt "Show all"',
        'run ./clamped --prompt "The with statement" --context-stats',
        'run build/smollm2-pydoc --prompt "What does yield do?" --chat --max-new-tokens 100',
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, or to answer with --chat.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option(
    "--context-stats", is_flag=True, help="Show how far the gates were open, site by site."
)
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME[=WEIGHT]",
    help="Of a switchable artifact; by default none. Several are a weighted mix.",
)  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, help="Draw from the K likeliest tokens; 0 is all.")
@click.option("--top-p", default=1.0, help="Draw from the tokens that hold this probability.")
@click.option("--repetition-penalty", default=1.0, help="Above 1: what was said becomes unlikely.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@click.option(
    "--provider", default="auto", show_default=True, metavar="auto|cpu|cuda",
    help="Where it runs.",
)  # fmt: skip
@shared_options
def run(
    artifact: Path, prompt: str, max_new_tokens: int, context_stats: bool, chat: bool,
    adapters: tuple[str, ...], provider: str, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generate text from a published ARTIFACT on ONNX Runtime, greedily or drawn."""
    from adaptrix_export.runtime import Sampling, Session

    how = Sampling(**sampling)
    session = Session(artifact, provider=provider)
    session.use(_selection(adapters))
    if not as_json and not context_stats:
        for piece in session.stream(prompt, max_new_tokens, chat, sampling=how):
            click.echo(piece, nl=False)  # click flushes
        click.echo()
        return
    words = session.tokenizer
    asked = words.encode_chat(prompt) if chat else words.encode(prompt)
    tokens = session.generate_ids(asked, max_new_tokens, sampling=how)
    text = "".join(words.stream(asked, tokens))
    told = {"prompt": prompt, "text": text, "tokens": tokens, "stats": session.stats()}
    fed = [*asked, *tokens[:-1]]  # the last token was given, and never asked about
    sites = session.context(fed) if context_stats else []
    if as_json:
        stats = {"context": [asdict(site) for site in sites]} if context_stats else {}
        failures.print_json(told | stats)
        return
    click.echo(text)
    click.echo(f"{'site':50} gate mean   least  clamped")
    for s in sites:
        click.echo(f"{s.site:50} {s.gate_mean:9.3f} {s.gate_min:7.3f} {100 * s.clamped:7.1f}%")


def _selection(adapters: tuple[str, ...]) -> dict[str, float]:
    """`NAME` or `NAME=WEIGHT`, as often as given."""
    chosen: dict[str, float] = {}
    for text in adapters:
        name, _, weight = text.partition("=")
        try:
            chosen[name] = float(weight) if weight else 1.0
        except ValueError:
            raise click.BadParameter(
                f"{weight!r} is no number", param_hint=f"--adapter {name}"
            ) from None
    return chosen
