"""Bad input through the command line: one line that teaches, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adaptrix_export.cli import main
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    base = save_base("llama", folder / "base")
    other = save_base("llama", folder / "other", hidden_size=32)
    save_adapter(base, folder / "adapter")
    save_adapter(other, folder / "wrong")
    odd = save_adapter(base, folder / "odd")
    path = odd / "adapter_model.safetensors"
    extra = {"base_model.model.model.layers.0.lora_Z.weight": torch.ones(2)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    short = save_base("llama", folder / "short") / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-100])
    return folder


CASES = {
    "missing folder": (["--base", "{files}/nothing"], "nothing there"),
    "adapter for another model": (["--adapter", "{files}/wrong"], "trained on another model?"),
    "unknown adapter key": (["--adapter", "{files}/odd"], "lora_Z.weight: a tensor that belongs"),
    "truncated safetensors": (["--base", "{files}/short"], "cut short"),
    "recipe typo": (["--set", "parity.levle=full"], "did you mean 'level'?"),
    "output folder exists": (["--out", "{files}/adapter"], "exists, expected a new path"),
    "no room": ([], "0 MB free"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line(tmp_path, files, monkeypatch, case):
    changed, message = CASES[case]
    if case == "no room":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    options = {
        "--base": "{files}/base",
        "--adapter": "{files}/adapter",
        "--out": str(tmp_path / "out"),
        "--target": "safetensors",
        "--parity": "fast",
    }
    options.update(dict(zip(changed[::2], changed[1::2], strict=True)))
    words = [w.format(files=files) for pair in options.items() for w in pair]
    before = sorted(files.rglob("*"))
    result = CliRunner().invoke(main, ["build", *words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == [] and sorted(files.rglob("*")) == before

    result = CliRunner().invoke(main, ["build", *words, "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 2 and told["place"] and told["found"]
    assert told["expected"] or told["remedy"]
