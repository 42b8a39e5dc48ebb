"""Inputs that people file: a buffer of integers in a checkpoint, numbers that are none, sizes that
contradict the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from adaptrix_export.cli import main
from adaptrix_export.graph.frontends.traced import traced
from adaptrix_export.graph.structure import check_structure
from adaptrix_export.load.open_base import open_base
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from tests.tiny import save_base
from tests.trust.fixtures import Inputs, copied, make_inputs, rewrite

TARGETS = ("safetensors", "peft", "onnx", "onnx-switchable")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def build(folder: Path, target: str = "safetensors") -> Result:
    arguments = ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
                 "--target", target, "--parity", "off", "--out", str(folder / "out")]  # fmt: skip
    return CliRunner().invoke(main, arguments)


def changed(inputs: Inputs, folder: Path, file: str, **fields: Any) -> Path:
    copied(inputs.base, folder / "base")
    copied(inputs.adapter, folder / "adapter")
    rewrite(folder / file, lambda old: json.dumps({**json.loads(old), **fields}).encode())
    return folder


SIZES = [
    ({"hidden_size": 128}, "hidden_size: 128, expected 64, the width of the embedding"),
    ({"num_attention_heads": 0}, "num_attention_heads: 0, expected a whole number from 1"),
    ({"num_attention_heads": 3}, "num_key_value_heads: 2, expected a divisor of 3 heads"),
    ({"num_hidden_layers": -1}, "num_hidden_layers: -1, expected a whole number from 1"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000, expected a whole number"),
    ({"num_hidden_layers": 9}, "num_hidden_layers: 9, expected 2, the layers that have tensors"),
    ({"vocab_size": 299}, "vocab_size: 299, expected 300, the rows of the embedding"),
    ({"num_key_value_heads": 4}, "num_key_value_heads: 4, expected what gives"),
    ({"intermediate_size": 95}, "intermediate_size: 95, expected what gives"),
]


@pytest.mark.parametrize(("fields", "said"), SIZES)
def test_sizes_that_contradict_the_tensors_are_refused(
    inputs: Inputs, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    done = build(changed(inputs, tmp_path, "base/config.json", **fields))
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_an_alpha_that_is_no_number_is_refused(
    inputs: Inputs, tmp_path: Path, alpha: float, target: str
) -> None:
    folder = changed(inputs, tmp_path, "adapter/adapter_config.json", lora_alpha=alpha)
    done = build(folder, target)
    assert done.exit_code == 2, done.output
    assert "lora_alpha" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_integers_in_a_checkpoint_stay_out_of_the_weights(tmp_path: Path) -> None:
    """A BERT checkpoint may store its position ids, which no call of the model changes."""
    base = save_base("bert", tmp_path / "base", num_hidden_layers=1)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["embeddings.position_ids"] = torch.arange(256)[None].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    plan = Plan(open_base(str(base), "feature-extraction"), ())
    graph = traced(plan, "cpu", Silent())
    assert not [name for name in graph.weights if "position_ids" in name]
    check_structure(graph.model, graph.weights, plan, "traced")


@pytest.mark.parametrize("file", ["base/config.json", "adapter/adapter_config.json"])
def test_a_byte_order_mark_is_named_by_validate_and_by_build(
    inputs: Inputs, tmp_path: Path, file: str
) -> None:
    """Neither transformers nor PEFT reads such a file, so nothing could be proved against them."""
    folder = changed(inputs, tmp_path, file)
    rewrite(folder / file, lambda old: b"\xef\xbb\xbf" + old)
    originals = [str(folder / "base"), str(folder / "adapter")]
    checked = CliRunner().invoke(main, ["validate", *originals, "--json"])
    for done in (checked, build(folder)):
        assert done.exit_code == 2
        assert Path(file).name in done.output and "a byte order mark" in done.output
    assert not (tmp_path / "out").exists()
