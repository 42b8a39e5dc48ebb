"""What to build, as data: a YAML file, flags, or a call, all to the same frozen `Recipe`."""

from adaptrix_export.recipe.recipe import (
    MAX_BYTES,
    Recipe,
    load_recipe,
    make_recipe,
    read_document,
    recipe_schema,
    with_overrides,
)
from adaptrix_export.recipe.sections import ComposeSpec

__all__ = [
    "MAX_BYTES",
    "ComposeSpec",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "read_document",
    "recipe_schema",
    "with_overrides",
]
