"""No link of a base or an adapter leads out of its folder; the hub's cache is one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.errors import SourceError
from adaptrix_export.load.source import resolve
from adaptrix_export.package.sentence import copy_sentence_files
from tests.trust.fixtures import Inputs, copied, make_inputs

SECRET = "root:x:0:0\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "passwd"
    path.write_text(SECRET)
    return path


def build(folder: Path) -> list[str]:
    return ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
            "--target", "safetensors", "--parity", "off", "--out", str(folder / "out")]  # fmt: skip


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "model.safetensors"])
def test_a_link_out_of_a_folder_is_refused(
    inputs: Inputs, tmp_path: Path, secret: Path, which: str, name: str
) -> None:
    copied(inputs.base, tmp_path / "base")
    copied(inputs.adapter, tmp_path / "adapter")
    (tmp_path / which / name).unlink(missing_ok=True)
    (tmp_path / which / name).symlink_to(secret)
    done = CliRunner().invoke(main, build(tmp_path))
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"{name}: a link to {secret}, expected a file of this folder" in done.stderr


def test_so_is_one_through_a_linked_folder_or_below(inputs: Inputs, tmp_path: Path) -> None:
    elsewhere = copied(inputs.adapter, tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").symlink_to(elsewhere)
    with pytest.raises(SourceError, match=r"checkpoint: a link to .*elsewhere"):
        resolve(str(tmp_path / "run"))
    (tmp_path / "run/checkpoint").unlink()
    (tmp_path / "run/1_Pooling").mkdir()
    (tmp_path / "run/1_Pooling/config.json").symlink_to(elsewhere / "adapter_config.json")
    with pytest.raises(SourceError, match=r"config.json: a link to"):
        resolve(str(tmp_path / "run"))
    deep = tmp_path / "sentence/2_Dense/deep"
    deep.mkdir(parents=True)
    (tmp_path / "sentence/modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    (deep / "config.json").symlink_to(elsewhere / "adapter_config.json")
    with pytest.raises(SourceError, match=r"config.json: a link to"):
        copy_sentence_files(tmp_path / "sentence", tmp_path)


def test_links_within_a_folder_and_of_no_interest_are_left_alone(
    inputs: Inputs, tmp_path: Path, secret: Path
) -> None:
    base = copied(inputs.base, tmp_path / "base")
    (base / "weights.safetensors").hardlink_to(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("weights.safetensors")
    (base / "README.md").symlink_to(secret)
    (base / "logs").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(base)  # the folder itself may be one
    assert resolve(str(tmp_path / "link")).folder == tmp_path / "link"


def hub_cache(base: Path, folder: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links into the blobs of the repository."""
    snapshot, blobs = folder / "models--o--n/snapshots/0123abc", folder / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_hub_cache_is_one_folder(inputs: Inputs, tmp_path: Path, secret: Path) -> None:
    snapshot = hub_cache(inputs.base, tmp_path)
    copied(inputs.adapter, tmp_path / "adapter")
    (tmp_path / "base").symlink_to(snapshot)
    done = CliRunner().invoke(main, build(tmp_path))
    assert done.exit_code == 0, done.stderr
    tokenizer = tmp_path / "out/tokenizer.json"
    assert not tokenizer.is_symlink()
    assert tokenizer.read_bytes() == (inputs.base / "tokenizer.json").read_bytes()
    blob = tmp_path / "models--o--n/blobs" / ("f" * 40)
    blob.symlink_to(secret)  # a blob that is a link out of the repository
    (snapshot / "vocab.txt").symlink_to(f"../../blobs/{'f' * 40}")
    with pytest.raises(SourceError, match=rf"vocab.txt: a link to {secret}"):
        resolve(str(snapshot))
