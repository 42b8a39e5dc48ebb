"""What each way of installing brings along, and what the others then say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests import clients
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_runtime_extra_runs_artifacts_and_brings_no_torch(tmp_path):
    base = save_base_with_tokenizer("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "lora")
    recipe = Recipe(base=str(base), adapters=(str(adapter),), target="onnx", out=tmp_path / "out")
    build(recipe)
    here = CliRunner().invoke(main, ["run", str(tmp_path / "out"), "--prompt", "one two"])
    python = clients.environment(
        "runtime", f"{ROOT}[runtime]", stamp=(ROOT / "pyproject.toml").read_text()
    )
    # the package's code as it is now, over what was installed when the environment was made
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import adaptrix_export.cli as c; "
    told = clients.run(
        python, "-c", command + "c.main()", "run", tmp_path / "out", "--prompt", "one two",
        cwd=tmp_path,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout == here.stdout
    listed = clients.run(python, "-m", "pip", "list", "--format", "freeze", cwd=tmp_path).stdout
    installed = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert "onnxruntime" in installed
    assert not {"torch", "transformers", "peft", "onnx", "safetensors", "optimum"} & installed
    refused = clients.run(
        python, "-c", command + "c.main()", "build", "--base", base, "--adapter", adapter,
        "--target", "onnx", "--out", tmp_path / "other", cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 3
    assert "pip install 'adaptrix-export[cpu]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    base = save_base_with_tokenizer("llama", tmp_path / "base")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert CliRunner().invoke(main, ["inspect", str(base)]).exit_code == 0  # headers need no peft
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = CliRunner().invoke(main, ["inspect", "hf:someone/something"])
    assert told.exit_code == 3
    assert "pip install 'adaptrix-export[cpu]'" in told.stderr
