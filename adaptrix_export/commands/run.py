"""Command `run`: text from an artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures

if TYPE_CHECKING:
    from adaptrix_export.runtime import Sampling, Session

log = logging.getLogger("adaptrix_export.run")


@click.command(
    short_help="Generate text from an artifact.",
    epilog=examples(
        'run build/smollm2-pydoc --prompt "The with statement"',
        'run build/switchable --adapter sql --temperature 0.7 --seed 1 --prompt "Show all"',
        'run ./clamped --prompt "The with statement" --context-stats',
        'run build/smollm2-pydoc --prompt "What does yield do?" --chat --max-new-tokens 100',
        "run build/smollm2-pydoc --prompts questions.txt --json",
        "run build/smollm2-pydoc --chat",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--prompt", help="The text to continue, or to answer with --chat; without it, one is asked for."
)
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with a prompt in each line, answered one after the other.",
)
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
@click.option(
    "--lookup", default=0, show_default=True, type=click.IntRange(0), metavar="N",
    help="Guess up to N tokens a step from the text so far; the same tokens, sooner.",
)  # fmt: skip
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@click.option(
    "--provider", default="auto", show_default=True, metavar="auto|cpu|cuda",
    help="Where it runs.",
)  # fmt: skip
@click.option(
    "--no-check", is_flag=True, help="Do not compare files with the manifest before using them."
)
@shared_options
def run(
    artifact: Path, prompt: str | None, file: Path | None, max_new_tokens: int,
    context_stats: bool, chat: bool, adapters: tuple[str, ...], provider: str, no_check: bool,
    as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generate text from a published ARTIFACT on ONNX Runtime, greedily or drawn.

    Without a prompt it asks for one, again and again, until an empty line or Ctrl-D. -v tells how
    many tokens a second were made.
    """
    from adaptrix_export.runtime import Sampling, Session

    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --prompts exclude each other.")
    how = Sampling(**sampling)
    session = Session(artifact, provider=provider, check=not no_check)
    session.use(_selection(adapters))
    one = prompt if file is None else None
    if one is None and (as_json or context_stats) and file is None:
        raise click.UsageError("--json and --context-stats need --prompt or --prompts.")
    if one is not None and (as_json or context_stats):
        _one_whole(session, one, max_new_tokens, chat, how, as_json, context_stats)
        return
    prompts = [one] if one is not None else _lines(file) if file is not None else _asked()
    if as_json:
        answers = [
            {"prompt": text, "text": session.generate(text, max_new_tokens, chat, sampling=how)}
            for text in prompts
        ]
        failures.print_json({"answers": answers, "stats": session.stats()})
        return
    for text in prompts:
        if file is not None:
            click.echo(f"> {text}")
        _spoken(session, text, max_new_tokens, chat, how)


def _lines(file: Path) -> list[str]:
    """The prompts of a file; empty lines are none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file} is not UTF-8 ({error})", param_hint="--prompts") from None
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise click.BadParameter(f"{file} has no prompt in it", param_hint="--prompts")
    return prompts


def _asked() -> Iterator[str]:
    """What a person types, until an empty line or the end of the input."""
    while True:
        try:
            text = click.prompt(">", prompt_suffix=" ", default="", show_default=False, err=True)
        except click.Abort:  # Ctrl-D, or the end of a pipe
            return
        if not text.strip():
            return
        yield text


def _spoken(session: Session, prompt: str, count: int, chat: bool, how: Sampling) -> None:
    """One answer, piece by piece, and its speed in the log."""
    before = sum(session.stats()["tokens"].values())
    start = time.perf_counter()
    for piece in session.stream(prompt, count, chat, sampling=how):
        click.echo(piece, nl=False)  # click flushes
    click.echo()
    seconds = time.perf_counter() - start
    made = sum(session.stats()["tokens"].values()) - before
    log.info("%d tokens in %.2f s, %.1f a second", made, seconds, made / seconds)


def _one_whole(
    session: Session, prompt: str, max_new_tokens: int, chat: bool, how: Sampling, as_json: bool,
    context_stats: bool,
) -> None:  # fmt: skip
    """One answer with its tokens and, if asked for, the statistics of its gates."""
    words = session.tokenizer
    ids = words.encode_chat(prompt) if chat else words.encode(prompt)
    tokens = session.generate_ids(ids, max_new_tokens, sampling=how)
    text = "".join(words.stream(ids, tokens))
    answer = {"prompt": prompt, "text": text, "tokens": tokens, "stats": session.stats()}
    fed = [*ids, *tokens[:-1]]  # the last token was given, and never asked about
    sites = session.context(fed) if context_stats else []
    if as_json:
        stats = {"context": [asdict(site) for site in sites]} if context_stats else {}
        failures.print_json(answer | stats)
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
