"""The traced front end: interface, weights by name, bytes, and whole builds."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from adaptrix_export.lower.merged_onnx import lower_merged_onnx
from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from tests.artifacts import plan_of
from tests.test_tasks import save_trained
from tests.tiny import VOCAB, save_adapter, save_base

pytestmark = pytest.mark.slow


def interface(path):
    graph = ir.load(path).graph
    return [
        [(v.name, [n if isinstance(n, int) else None for n in v.shape]) for v in values]
        for values in (graph.inputs, graph.outputs)
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_front_ends_have_one_interface_and_pass_one_proof(tmp_path, kind):
    base = save_base(kind, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    found = {}
    for frontend in ("native", "traced"):
        out = tmp_path / frontend
        outcome = build(
            Recipe(
                base=str(base), adapters=[str(adapter)], target="onnx", out=out, frontend=frontend
            )
        )
        assert outcome.report is not None and outcome.report["passed"]
        assert len(outcome.report["cases"]) == 5
        assert max(case["max_abs"] for case in outcome.report["cases"]) <= 1e-4
        assert outcome.manifest["frontend"] == frontend
        found[frontend] = interface(out / "model.onnx")
    assert found["native"] == found["traced"]


def test_same_inputs_same_bytes_and_no_path_of_this_machine(tmp_path):
    plan = plan_of(save_base("llama", tmp_path / "base", num_hidden_layers=1))
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(lower_merged_onnx(plan, tmp_path / name, Silent(), "traced").hashes)
    assert hashes[0] == hashes[1]
    data = (tmp_path / "one" / "model.onnx").read_bytes()
    assert b"site-packages" not in data and str(tmp_path).encode() not in data


@pytest.mark.parametrize("kind", ["roberta", "bloom"])
def test_types_that_native_gets_wrong_are_built_right_without_a_flag(tmp_path, kind):
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    sizes |= dict(hidden_size=64, intermediate_size=96, initializer_range=0.15)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    auto = AutoModelForCausalLM if kind == "bloom" else AutoModel
    model = auto.from_config(AutoConfig.for_model(kind, **sizes, **ids))
    model.save_pretrained(tmp_path / "base")
    task = {"task_type": "CAUSAL_LM"} if kind == "bloom" else {}
    adapter = save_trained(model, tmp_path / "a", target_modules="all-linear", **task)
    outcome = build(
        Recipe(
            base=str(tmp_path / "base"), adapters=[str(adapter)], target="onnx",
            out=tmp_path / "out",
        )
    )  # fmt: skip
    assert outcome.report is not None and outcome.report["passed"]
    assert max(case["max_abs"] for case in outcome.report["cases"]) <= 1e-4
    assert outcome.manifest["frontend"] == "traced"
    assert outcome.manifest["frontend_reason"].startswith("native: ")
