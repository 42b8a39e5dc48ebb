"""Command `completion`: what a shell needs to complete commands, options and their words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from adaptrix_export.commands.options import examples

PROGRAM = "adaptrix-export"
VARIABLE = "_ADAPTRIX_EXPORT_COMPLETE"


@click.command(
    short_help="Print a script for shell completion.",
    epilog=examples(
        "completion bash >> ~/.bashrc", "completion zsh >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/adaptrix-export.fish",
    ),
)  # fmt: skip
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and file names."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())
