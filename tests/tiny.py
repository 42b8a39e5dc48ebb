"""Tiny real models and adapters: seeded, made by transformers and PEFT, never with a zero B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 300
_SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=256,
)


def config_of(kind: str, **changed: Any) -> Any:
    """A small config of one model type."""
    if kind == "gpt2":
        sizes = dict(n_embd=64, n_layer=4, n_head=4, vocab_size=VOCAB, n_positions=256)
        return GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changed})
    if kind == "qwen3":
        return Qwen3Config(**{**_SHAPE, "head_dim": 32, **changed})
    if kind == "mixtral":
        experts = dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
        return MixtralConfig(**{**_SHAPE, **experts, **changed})
    if kind == "qwen3_moe":
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
        return Qwen3MoeConfig(**{**_SHAPE, **experts, "head_dim": 32, **changed})
    if kind == "bert":
        sizes = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
        return BertConfig(**{**sizes, **changed})
    return LlamaConfig(**{**_SHAPE, "tie_word_embeddings": True, **changed})


def auto_of(kind: str) -> Any:
    """The class that loads a kind: an encoder has no language model's head."""
    return AutoModel if kind == "bert" else AutoModelForCausalLM


def save_base(
    kind: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
    **changed: Any,
) -> Path:
    """A random model of `kind`, saved as transformers saves it."""
    torch.manual_seed(seed)
    model = auto_of(kind).from_config(config_of(kind, **changed))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A LoRA on `base` with non-zero factors, saved as PEFT saves it."""
    torch.manual_seed(seed)
    kind = AutoConfig.from_pretrained(base).model_type
    model = auto_of(kind).from_pretrained(base, dtype=torch.float32)
    task = "FEATURE_EXTRACTION" if kind == "bert" else "CAUSAL_LM"
    settings = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "task_type": task}
    peft = get_peft_model(model, LoraConfig(**{**settings, **options}))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # the factors that begin as zeros
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder


def live(base: Path, *adapters: Path) -> torch.nn.Module:
    """Stock PyTorch + PEFT on the saved files, all adapters active, float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for i, folder in enumerate(adapters[1:], 1):
        peft.load_adapter(folder, adapter_name=f"a{i}")
    peft.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return peft.eval()
