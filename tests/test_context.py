"""Context preservation from recipe to running artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter
from tests.tools.zoo import house
from tests.tools.zoo_rows import ANIMALS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("context")
    base = save_base_with_tokenizer("llama", folder / "base", initializer_range=0.15)
    return base, save_adapter(base, folder / "adapter")


def recipe(
    folders: tuple[Path, Path], out: Path, context: dict[str, object], target: str
) -> Recipe:
    base, adapter = map(str, folders)
    return Recipe(base=base, adapters=[adapter], target=target, out=out, context=context,
                  parity={"decode_steps": 4})  # fmt: skip


def test_a_calibrated_clamp_is_built_proved_run_and_verified(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    context = {"tau": "calibrated", "share": 0.5, "stats": True}
    outcome = build(recipe(folders, tmp_path / "out", context, "onnx"))
    assert outcome.report is not None
    assert outcome.report["passed"] and len(outcome.report["context"]["checks"]) == 4
    gates = outcome.manifest["context"]["gates"]
    (tau,) = {gate["tau"] for gate in gates}
    assert len(gates) == 28 and f"tau={tau}" in outcome.manifest["history"][-1]
    clamped = [line["clamped"] for line in outcome.report["context"]["sites"]]
    assert 0 < max(clamped) < 1
    asked = ["run", str(tmp_path / "out"), "--prompt", "the fox", "--max-new-tokens", "4"]
    done = CliRunner().invoke(main, [*asked, "--context-stats", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["context"]
    assert [line["site"] for line in told] == [gate["site"] for gate in gates]
    assert all(0 <= line["gate_min"] <= line["gate_mean"] <= 1 for line in told)
    base, adapter = map(str, folders)
    again = verify_artifact(tmp_path / "out", base=base, adapters=[adapter])
    assert again["parity"]["context"]["passed"]


@pytest.mark.parametrize("target", ["onnx", "safetensors", "peft"])
def test_a_blend_is_merged_and_proved(
    target: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    context = {"mode": "blend", "weight": {"1": 0.5, "2": 0.25}}
    outcome = build(recipe(folders, tmp_path / "out", context, target))
    assert outcome.report is not None
    assert outcome.report["passed"] and outcome.report["context"]["checks"] == []
    lines = outcome.report["context"]["sites"]
    assert {line["weight"] for line in lines} == {0.5, 0.25} and len(lines) == 14


def test_a_blend_of_an_encoder_decoder_is_merged_and_proved(tmp_path: Path) -> None:
    housed = house(next(animal for animal in ANIMALS if animal.kind == "t5"), tmp_path)
    context = {"mode": "blend", "weight": 0.5}
    made = recipe((housed.base, housed.adapter), tmp_path / "out", context, "onnx")
    outcome = build(made)
    assert outcome.report is not None
    assert outcome.report["passed"] and outcome.report["context"]["checks"] == []
    assert {line["weight"] for line in outcome.report["context"]["sites"]} == {0.5}


def test_statistics_need_an_artifact_that_gives_them(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    build(recipe(folders, tmp_path / "out", {"tau": 0.1}, "onnx"))
    asked = ["run", str(tmp_path / "out"), "--prompt", "the fox", "--max-new-tokens", "2"]
    assert CliRunner().invoke(main, asked).exit_code == 0
    done = CliRunner().invoke(main, [*asked, "--context-stats"])
    assert done.exit_code == 2 and "context.stats=true" in done.output
