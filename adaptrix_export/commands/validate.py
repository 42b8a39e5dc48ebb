"""Command `validate`: adapters checked against a base."""

from __future__ import annotations

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Check adapters against a base.",
    epilog=examples(
        "validate ./base ./lora",
        "validate hf:org/name@main ./lora ./other-lora --strict",
        "validate ./base ./lora --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--strict", is_flag=True, help="Exit with 2 on warnings, too.")
@shared_options
def validate(base: str, adapters: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Check each ADAPTER against a BASE, without building: all that is wrong, not the first.

    Exits with 0 if there are no errors, with 2 if there are.
    """
    from adaptrix_export.manage.validate import validate as check
    from adaptrix_export.show import findings
    from adaptrix_export.show.terminal import progress, show

    with progress() as telling:
        validation = check(base, adapters, telling)
    if as_json:
        failures.print_json(validation.as_dict())
    else:
        show(findings.table(validation))
        click.echo(validation.summary())
    raise click.exceptions.Exit(validation.exit_code(strict))
