"""Command `schema`: the JSON Schema of a recipe."""

from __future__ import annotations

import click

from adaptrix_export.commands.options import examples
from adaptrix_export.show import failures


@click.command(epilog=examples("schema > recipe.schema.json"))
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from adaptrix_export.recipe import recipe_schema

    failures.print_json(recipe_schema())
