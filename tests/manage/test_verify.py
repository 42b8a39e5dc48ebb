"""`verify` says what it did, and finds whatever was changed or added."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adaptrix_export.cli import main
from adaptrix_export.errors import SourceError, VerificationError
from adaptrix_export.package import check_hashes, read_manifest
from adaptrix_export.prove.preflight import preflight
from tests.tiny import save_adapter, save_base


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base("llama", folder / "base", num_hidden_layers=1)
    return base, save_adapter(base, folder / "adapter")


@pytest.fixture(scope="module")
def built(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made without a proof, its originals named by absolute paths."""
    out = tmp_path_factory.mktemp("built") / "out"
    done = invoke("build", "--base", inputs[0], "--adapter", inputs[1], "--target", "safetensors",
                  "--parity", "off", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def test_originals_of_absolute_paths_are_found_again(built: Path) -> None:
    """The manifest holds no path; the machine remembers."""
    assert read_manifest(built).recipe["base"] == "path:base"
    done = invoke("verify", built, "--json", "--require-parity")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["proof"] == "re-proved" and found["parity"]["passed"]


def test_without_originals_it_was_never_proved(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Negative control: another machine, whose cache remembers nothing."""
    monkeypatch.setenv(preflight.CACHE, str(tmp_path))
    done = invoke("verify", built)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith("UNVERIFIED")
    assert "never proved" in done.stdout and "\nverified" not in done.stdout
    done = invoke("verify", built, "--require-parity")
    assert done.exit_code == 1
    assert "never proved" in done.stderr


def test_what_is_remembered_is_used_only_if_its_bytes_are_right(
    inputs: tuple[Path, Path], built: Path, tmp_path: Path
) -> None:
    other = save_adapter(inputs[0], tmp_path / "other", seed=9)
    done = invoke("verify", built, "--base", inputs[0], "--adapter", other)
    assert done.exit_code == 1
    assert "another file than the artifact was built from" in done.stderr


ADDITIONS: dict[str, Callable[[Path], Any]] = {
    "an empty folder": lambda folder: (folder / "more").mkdir(),
    "a broken link": lambda folder: (folder / "more").symlink_to("nowhere"),
    "a link to a folder": lambda folder: (folder / "more").symlink_to("/tmp"),
    "a FIFO": lambda folder: os.mkfifo(folder / "more"),
    "an empty file": lambda folder: (folder / "more").touch(),
    "a file in a folder": lambda folder: ((folder / "a").mkdir(), (folder / "a/more").touch()),
}


@pytest.mark.parametrize("kind", ADDITIONS)
def test_additions_of_every_kind_are_found(artifact: Path, kind: str) -> None:
    assert check_hashes(artifact) == []
    ADDITIONS[kind](artifact)
    assert len(check_hashes(artifact)) == 1


def test_a_file_replaced_by_a_link_to_its_copy_is_found(artifact: Path) -> None:
    config = artifact / "config.json"
    config.rename(artifact.parent / "copy.json")
    config.symlink_to(artifact.parent / "copy.json")
    (problem,) = check_hashes(artifact)
    assert str(problem) == "config.json: a link, expected a file"


def test_every_flipped_bit_of_the_manifest_is_found(artifact: Path) -> None:
    path = artifact / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 400)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises((VerificationError, SourceError)):
                read_manifest(artifact)
    path.write_bytes(whole)
    read_manifest(artifact)
