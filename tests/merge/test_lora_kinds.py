"""Every kind of LoRA parameter, merged to safetensors and ONNX, against PEFT's live model."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.replication import repeat_layers
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.runtime.layout import located
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from adaptrix_export.targets.merged_safetensors import lower_merged_safetensors
from tests.tiny import live, save_adapter, save_base

IDS = torch.arange(60).view(2, 30)
NAMES = {
    "llama": {"Q": "q_proj", "EMBED": "embed_tokens", "HEAD": "lm_head", "NORM": "norm"},
    "gpt2": {"Q": "c_attn", "EMBED": "wte", "HEAD": "lm_head", "NORM": "ln_f"},
}
KINDS = {
    "dora": dict(use_dora=True),
    "dora, rslora, ranks": dict(use_dora=True, use_rslora=True, rank_pattern={"Q": 2}),
    "lora_bias": dict(lora_bias=True, target_modules=["Q"]),
    "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only"),
    "embedding": dict(target_modules=["Q", "EMBED"]),
    "dora on an embedding": dict(target_modules=["Q", "EMBED"], use_dora=True),
    "head": dict(target_modules=["Q", "HEAD"]),
    "embedding and head": dict(target_modules=["Q", "EMBED", "HEAD"]),
    "token rows": dict(target_modules=["Q"], trainable_token_indices=[3, 7]),
    "saved norms": dict(target_modules=["Q"], modules_to_save=["NORM"]),
    "two layers": dict(target_modules=["Q"], layers_to_transform=[1, 3]),
}


def named(value, names):
    """The options with Q, EMBED, ... replaced by the model's own names."""
    if isinstance(value, dict):
        return {named(k, names): named(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [named(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def plan_of(base, adapter):
    opened = open_base(str(base))
    return verify(repeat_layers(Plan(opened, (open_adapter(str(adapter), opened),))))


def logits_of_safetensors(plan, folder):
    folder.mkdir()
    artifact = lower_merged_safetensors(plan, folder, Silent())
    config = {**plan.base.config, **artifact.config_changes}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits.numpy()


def logits_of_onnx(plan, folder):
    folder.mkdir()
    lower_merged_onnx(plan, folder, Silent())
    session = ort.InferenceSession(located(folder, "model.onnx"))
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 30), np.int64)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            given[value.name] = np.tile(np.arange(30), (2, 1))
        elif value.name.startswith("past_key_values"):
            given[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], given)[0]


def check(base, adapter, folder):
    """Both targets within 1e-5 of the live model, which the adapter does change."""
    with torch.no_grad():
        expected = live(base, adapter)(IDS).logits.numpy()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(IDS).logits.numpy()
    assert np.abs(expected - plain).max() > 1e-3  # negative control: doing nothing would fail
    plan = plan_of(base, adapter)
    for lower in (logits_of_safetensors, logits_of_onnx):
        assert np.abs(lower(plan, folder / lower.__name__) - expected).max() < 1e-5, lower.__name__
    return plan


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        ("llama", True): save_base("llama", folder / "lt", attention_bias=True),
        ("llama", False): save_base("llama", folder / "lu", tie_word_embeddings=False),
        ("gpt2", True): save_base("gpt2", folder / "gt"),
        ("gpt2", False): save_base("gpt2", folder / "gu", tie_word_embeddings=False),
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_live_model(tmp_path, bases, kind, model, tied):
    if kind == "lora_bias" and (model, tied) == ("llama", False):
        pytest.skip("that base has no biases; the next test is about it")
    base = bases[model, tied]
    options = named(KINDS[kind], NAMES[model])
    plan = check(base, save_adapter(base, tmp_path / "a", **options), tmp_path)
    breaks_tie = tied and ("head" in kind or "embedding" in kind)
    assert plan.untied() == (("lm_head.weight",) if breaks_tie else ())


def test_a_bias_that_the_base_lacks_is_refused(tmp_path, bases):
    base = bases["llama", False]
    adapter = save_adapter(base, tmp_path / "a", lora_bias=True)
    with pytest.raises(UnsupportedError, match="a module with a bias in the base"):
        plan_of(base, adapter)


def test_repeated_layers_get_their_own_weights(tmp_path, bases):
    """PEFT's merge adds both copies' deltas to the layer they share; the live model does not."""
    base = bases["llama", True]
    adapter = save_adapter(base, tmp_path / "a", layer_replication=[[0, 3], [1, 4]])
    plan = check(base, adapter, tmp_path)
    assert config_changes(plan)["num_hidden_layers"] == 6
    merged = live(base, adapter).merge_and_unload()
    with torch.no_grad():
        wrong = merged(IDS).logits.numpy()
        right = live(base, adapter)(IDS).logits.numpy()
    assert np.abs(wrong - right).max() > 1e-2


def test_tied_weights_trained_together(tmp_path, bases):
    base = bases["llama", True]
    options = dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    assert check(base, save_adapter(base, tmp_path / "a", **options), tmp_path).untied()


@pytest.mark.parametrize("ranges", [[[0, 9]], [[1]], ["ab"], [[0.5, 2]]])
def test_impossible_repetitions_are_named(tmp_path, bases, ranges):
    base = bases["llama", True]
    adapter = save_adapter(base, tmp_path / "a")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": ranges}))
    with pytest.raises((AdapterError, UnsupportedError), match="layer_replication"):
        plan_of(base, adapter)
