"""`portable: true`: a checkpoint whose config transformers 4 reads as 5 does."""

import json

import pytest

from adaptrix_export.errors import RecipeError
from adaptrix_export.package.model_config import lost_in_4
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tiny import save_adapter, save_base

THETA = {"rope_theta": 500000.0, "rope_type": "default"}


@pytest.fixture
def given(tmp_path):
    base = save_base("llama", tmp_path / "base", rope_parameters=THETA)
    adapter = save_adapter(base, tmp_path / "adapter")
    return {"base": str(base), "adapters": [str(adapter)], "out": tmp_path / "out"}


def built(given, **changed):
    outcome = build(Recipe(**given, target="safetensors", **changed))
    return outcome, json.loads((given["out"] / "config.json").read_text())


def test_both_spellings_are_written(given):
    outcome, config = built(given, portable=True)
    assert outcome.report["passed"]
    assert config["rope_theta"] == 500000.0 and config["rope_parameters"] == THETA
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert not any("transformers 4" in note for note in outcome.notes)


def test_without_it_the_file_is_the_base_s_and_a_note_says_what_is_lost(given):
    """Negative control."""
    outcome, config = built(given, parity={"level": "off"})
    assert "rope_theta" not in config
    assert any("transformers 4 finds no rope_theta" in note for note in outcome.notes)


def test_what_4_does_not_find():
    assert lost_in_4({"model_type": "llama", "rope_theta": 1.0, "rope_parameters": THETA}) == []
    scaled = {**THETA, "rope_type": "linear", "factor": 2.0}
    assert lost_in_4({"model_type": "llama", "rope_parameters": scaled}) == [
        "rope_scaling",
        "rope_theta",
    ]


def test_a_graph_is_portable_without_it(given):
    with pytest.raises(RecipeError, match="portable with target onnx"):
        Recipe(**given, target="onnx", portable=True)
