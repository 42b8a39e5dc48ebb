"""LoRA in full through the whole compiler: what PEFT runs live is what parity proves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tiny import save_base

GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
VARIANTS = {
    "DoRA": ("llama", dict(use_dora=True)),
    "DoRA on Conv1D": ("gpt2", dict(use_dora=True, **GPT2)),
    "DoRA on an embedding": ("gpt2", dict(use_dora=True, target_modules=["wte"])),
    "embedding and head": ("llama", dict(target_modules=["embed_tokens", "q_proj", "lm_head"])),
    "lora_bias": ("gpt2", dict(lora_bias=True, **GPT2)),
    "every bias": ("gpt2", dict(bias="all", **GPT2)),
    "biases of adapted modules": ("gpt2", dict(bias="lora_only", **GPT2)),
    "token rows": ("llama", dict(trainable_token_indices=[1, 2, 9])),
    "repeated layers": ("llama", dict(layer_replication=[[0, 3], [1, 4]])),
    "a norm saved whole": ("llama", dict(modules_to_save=["norm"])),
}


def save_lora(base, folder, **options):
    """A LoRA whose every trained parameter was moved, biases and token rows too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **options}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_build_is_proved(tmp_path, variant):
    kind, options = VARIANTS[variant]
    base = save_base(kind, tmp_path / "base")
    adapter = save_lora(base, tmp_path / "a", **options)
    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="safetensors", out=tmp_path / "out",
        parity={"level": "fast"},
    )  # fmt: skip
    report = build(recipe).report
    assert report is not None and report["passed"] and report["replay"]["changed"] > 0
