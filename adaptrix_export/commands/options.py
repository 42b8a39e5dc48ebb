"""What the commands share: `--json` and `-v`, and examples in their help."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
AS_JSON, VERBOSITY = "adaptrix_export.json", "adaptrix_export.verbosity"  # keys of ctx.meta


def examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  adaptrix-export {line}" for line in lines)


def word_option(name: str, words: str, text: str) -> Callable[[Function], Function]:
    """An option with its words in the help, `auto|native|traced`, which a shell completes.

    The recipe's schema checks the word, so that flags and files get the same message.
    """
    known = re.findall(r"[a-z][\w-]*", words)

    def matching(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return click.option(name, metavar=words, shell_complete=matching, help=text)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Keep an option of a command where `Commands.invoke` finds it."""
    ctx.meta[AS_JSON if param.name == "as_json" else VERBOSITY] = value
    return value


def _set_up(ctx: click.Context, param: click.Parameter, value: int) -> int:
    from adaptrix_export.show.terminal import set_up_logging

    set_up_logging(value)
    verbosity: int = _remember(ctx, param, value)
    return verbosity


def shared_options(function: Function) -> Function:
    """`--json` and `-v`, which every command that works on models has."""
    as_json = click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=_remember,
        help="Print one JSON document on stdout.",
    )  # fmt: skip
    verbosity = click.option(
        "-v", "--verbose", "verbosity", count=True, is_eager=True, callback=_set_up,
        expose_value=False, help="Show logs on stderr; twice for more.",
    )  # fmt: skip
    return as_json(verbosity(function))
