"""Command `schema`: the JSON Schema of a recipe, and of the documents of an artifact."""

from __future__ import annotations

import click

from adaptrix_export.commands.options import examples
from adaptrix_export.show import failures

DOCUMENTS = ("recipe", "manifest", "report")


@click.command(epilog=examples("schema > recipe.schema.json", "schema report"))
@click.argument("document", type=click.Choice(DOCUMENTS), default="recipe")
def schema(document: str) -> None:
    """Print the JSON Schema of a recipe, for editors, or of manifest.json or report.json."""
    from adaptrix_export.package.documents import (
        Document,
        ManifestDocument,
        ReportDocument,
        document_schema,
    )
    from adaptrix_export.recipe import recipe_schema

    kinds: dict[str, type[Document]] = {"manifest": ManifestDocument, "report": ReportDocument}
    if document in kinds:
        failures.print_json(document_schema(kinds[document], f"{document}.json"))
    else:
        failures.print_json(recipe_schema())
