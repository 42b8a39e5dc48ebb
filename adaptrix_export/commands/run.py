"""Command `run`: text from an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export import failures
from adaptrix_export.commands.options import examples, shared_options


@click.command(
    short_help="Generate text from an artifact.",
    epilog=examples(
        'run build/smollm2-pydoc --prompt "The with statement"',
        'run build/smollm2-pydoc --prompt "What does yield do?" --chat --max-new-tokens 100',
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, or to answer with --chat.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@shared_options
def run(artifact: Path, prompt: str, max_new_tokens: int, chat: bool, as_json: bool) -> None:
    """Generate text from a published ARTIFACT, greedily, on ONNX Runtime."""
    from adaptrix_export.runtime.session import Session

    session = Session(artifact)
    if not as_json:
        for piece in session.stream(prompt, max_new_tokens, chat):
            click.echo(piece, nl=False)  # click flushes
        click.echo()
        return
    words = session.tokenizer
    asked = words.encode_chat(prompt) if chat else words.encode(prompt)
    tokens = session.generate_ids(asked, max_new_tokens)
    text = "".join(words.stream(asked, tokens))
    failures.print_json({"prompt": prompt, "text": text, "tokens": tokens})
