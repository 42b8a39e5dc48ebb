"""manifest.json and report.json have types and versions, on writing and on reading."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.errors import SourceError
from adaptrix_export.package import read_manifest, write_manifest
from adaptrix_export.package.documents import ManifestDocument, ReportDocument, parse_document
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    base = save_base_with_tokenizer("llama", folder / "base")
    adapter = save_adapter(base, folder / "adapter")
    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="safetensors", out=folder / "out",
        parity={"level": "fast"},
    )  # fmt: skip
    build(recipe)
    return folder / "out"


def test_what_is_written_has_the_fields_and_no_others(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    report = json.loads((artifact / "report.json").read_text())
    assert report["format"] == 1 and manifest["format"] == 1
    assert not ManifestDocument.model_validate(manifest).model_extra
    assert not ReportDocument.model_validate(report).model_extra


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", 3),
        ("outputs", []),
        ("history", "Compose()"),
        ("tool", {"name": "x"}),
        ("sites", None),
    ],
)
def test_a_wrong_type_is_named(artifact, tmp_path, field, value):
    manifest = json.loads((artifact / "manifest.json").read_text())
    write_manifest(tmp_path, {**manifest, field: value})
    with pytest.raises(SourceError, match=f"manifest.json: {field}"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path).as_dict() | {"checksum": manifest["checksum"]} == manifest


def test_an_unknown_section_is_kept_and_another_version_refused(artifact):
    report = json.loads((artifact / "report.json").read_text())
    parse_document(ReportDocument, {**report, "new": {"a": 1}}, "report.json")
    with pytest.raises(SourceError, match="report.json: format: 2"):
        parse_document(ReportDocument, {**report, "format": 2}, "report.json")


@pytest.mark.parametrize("document", ["manifest", "report"])
def test_the_schema_is_printed(document):
    done = CliRunner().invoke(main, ["schema", document])
    printed = json.loads(done.output)
    assert (
        printed["title"] == f"{document}.json" and "parity" in str(printed)
    ) or document == "report"
    assert set(printed["required"]) <= set(printed["properties"])
