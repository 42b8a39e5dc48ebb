"""Bad input through the command line: one line that teaches, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adaptrix_export.cli import main
from adaptrix_export.errors import AdapterError
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
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


def test_an_adapter_for_another_task_is_told_which(tmp_path):
    """The modules are there, under the names that they have beside a head."""
    base = save_base("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="onnx", out=tmp_path / "out",
        task="feature-extraction",
    )  # fmt: skip
    with pytest.raises(AdapterError, match="task_type CAUSAL_LM.*; use --task text-generation"):
        build(recipe)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["task_type"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="was this adapter trained on another model"):
        build(recipe)
