"""Tiny adapters of every tuner of PEFT that merges, trained parameters far from the identity."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

LLAMA = ["q_proj", "v_proj", "down_proj", "up_proj"]
GPT2 = ["c_attn", "c_fc", "mlp.c_proj"]

# peft_type -> options; the sizes divide those of the models in tiny.py
LINEAR: dict[str, dict[str, Any]] = {
    "ADALORA": dict(init_r=4, target_r=2, total_step=10),
    "BOFT": dict(boft_block_size=4),
    "C3A": dict(block_size=8),
    "DEFT": dict(r=4),
    "DELORA": dict(r=4),
    "FOURIERFT": dict(n_frequency=50, scaling=30.0),
    "GLORA": dict(r=4),
    "GRALORA": dict(r=8, gralora_k=2, hybrid_r=2),
    "HIRA": dict(r=4),
    "HRA": dict(r=4),
    "IA3": dict(feedforward_modules=["down_proj"]),
    "LOHA": dict(r=4),
    "LOKR": dict(r=4),
    "MISS": dict(r=8),
    "OFT": dict(r=0, oft_block_size=8),
    "PEANUT": dict(r=4, depth=1),
    "PVERA": dict(r=8),
    "RANDLORA": dict(r=16, randlora_alpha=8),
    "ROAD": dict(group_size=16),
    "SHIRA": dict(r=4),
    "SUPERTUNING": dict(sparsity=0.9, r=2),
    "TINYLORA": dict(),
    "UNILORA": dict(r=4, theta_d_length=64, init_theta_d_bound=0.5),
    "VBLORA": dict(r=2, num_vectors=16, vector_length=16, topk=2),
    "VERA": dict(r=8),
    "WAVEFT": dict(n_frequency=50),
}
REPLACING: dict[str, dict[str, Any]] = {
    "LN_TUNING": dict(target_modules=["input_layernorm", "norm"]),
    "TRAINABLE_TOKENS": dict(token_indices=[1, 5, 7]),
}
CONV1D: dict[str, dict[str, Any]] = {
    **{
        kind: LINEAR[kind]
        for kind in (
            *("ADALORA", "DEFT", "FOURIERFT", "GRALORA", "HIRA", "PVERA", "RANDLORA"),
            *("TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
        )
    },
    "IA3": dict(feedforward_modules=["mlp.c_proj"]),
    "LN_TUNING": dict(target_modules=["ln_1", "ln_f"]),
    "TRAINABLE_TOKENS": dict(token_indices=[1, 5, 7], target_modules=["wte"]),
}


def options_of(kind: str, model: str) -> dict[str, Any]:
    """The options that `kind` is tested with on one of the models of tiny.py."""
    return CONV1D[kind] if model == "gpt2" else {**LINEAR, **REPLACING}[kind]


def save_tuned(base: Path, folder: Path, kind: str, seed: int = 1, **options: Any) -> Path:
    """An adapter of `kind` on `base`, every trained parameter moved, saved as PEFT saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    conv1d = model.config.model_type == "gpt2"
    settings = {"task_type": "CAUSAL_LM", "target_modules": GPT2 if conv1d else LLAMA, **options}
    if conv1d and "fan_in_fan_out" in {f.name for f in fields(cls)}:
        settings["fan_in_fan_out"] = True
    if kind == "TRAINABLE_TOKENS" and "target_modules" not in options:
        del settings["target_modules"]  # PEFT finds the embedding
    peft = get_peft_model(model, cls(**settings))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder
