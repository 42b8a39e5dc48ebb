"""The traced front end: interface, weights by name, bytes, and whole builds."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.prove.cases import padded_batch
from adaptrix_export.prove.preflight.child import answer
from adaptrix_export.prove.preflight.replica import shrunk
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime.layout import located
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from tests.artifacts import plan_of
from tests.test_tasks import save_trained
from tests.tiny import VOCAB, config_of, save_adapter, save_base
from tests.tools.zoo_played import Session

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
        found[frontend] = interface(located(out, "model.onnx"))
    assert found["native"] == found["traced"]


def test_same_inputs_same_bytes_and_no_path_of_this_machine(tmp_path):
    plan = plan_of(save_base("llama", tmp_path / "base", num_hidden_layers=1))
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(lower_merged_onnx(plan, tmp_path / name, Silent(), "traced").hashes)
    assert hashes[0] == hashes[1]
    data = located(tmp_path / "one", "model.onnx").read_bytes()
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


def test_layers_with_a_sliding_window_pass_the_whole_proof(tmp_path):
    """Past the window, in a cache too, and where a right-padded batch left pads between tokens."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sliding = config_of("qwen3", layer_types=kinds, sliding_window=64, use_sliding_window=True)
    config = shrunk(sliding.to_dict())
    assert config["sliding_window"] == 12 and set(config["layer_types"]) == set(kinds)
    asked = {"task": "text-generation", "provider": "cpu", "frontend": "traced"}
    assert answer({**asked, "config": config}, tmp_path) == {"passed": True, "why": ""}


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_embeddings_that_change_with_the_length(tmp_path, rope_type):
    """Within the original range of 32 tokens and beyond it, what transformers says to the same
    batch: it picks the frequencies by the longest row."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        factors = [1.0 + i / 8 for i in range(8)]
        rope |= {"short_factor": factors, "long_factor": [3 * f for f in factors]}
        rope |= {"original_max_position_embeddings": 32}
    positions = 32 if rope_type == "dynamic" else 128
    base = save_base(
        "llama", tmp_path / "base", num_hidden_layers=2, rope_parameters=rope,
        max_position_embeddings=positions, initializer_range=0.15,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    lower_merged_onnx(plan_of(base), tmp_path / "out", Silent(), "traced")
    session = Session(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCAB, (100,), generator=torch.manual_seed(5)).tolist()
    for rows in ([tokens[:20]], [tokens], [tokens[:20], tokens[:9]], [tokens[:90], tokens[:20]]):
        ids, mask, places = padded_batch(rows, left=True)
        found = session(input_ids=ids, attention_mask=mask, **session.empty(len(rows)))["logits"]
        with torch.inference_mode():
            expected = model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(places),
            ).logits.numpy()  # fmt: skip
        assert abs(found - expected)[mask == 1].max() <= 1e-4
