"""Quantized checkpoints as bitsandbytes and transformers write them, made without bitsandbytes.

The packing is written here a second time, from the description of the format; what bitsandbytes
itself writes is in tests/data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def four_bit_parts(weight: torch.Tensor, double: bool) -> dict[str, torch.Tensor]:
    """`weight`, `weight.absmax`, ... of one matrix in NF4, blocks of 64."""
    row = weight.float().flatten()
    blocks = torch.nn.functional.pad(row, (0, -len(row) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    distance = ((blocks * (1 / absmax)[:, None])[..., None] - NF4).abs()
    numbers = distance.argmin(-1).flatten()[: len(row)].to(torch.uint8)
    if len(numbers) % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(1)])
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape)}
    facts["dtype"] = str(weight.dtype).removeprefix("torch.")
    parts = {
        "weight": (numbers[::2] * 16 + numbers[1::2])[:, None],
        "weight.quant_map": NF4.clone(),
    }
    if double:
        levels = torch.linspace(-1, 1, 256)
        offset = absmax.mean()
        scale = (absmax - offset).abs().max()
        picked = ((absmax - offset)[:, None] / scale - levels).abs().argmin(-1)
        facts |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
        count = -(-len(absmax) // 256)
        parts |= {
            "weight.absmax": picked.to(torch.uint8),
            "weight.nested_absmax": scale.repeat(count),
            "weight.nested_quant_map": levels,
        }
    else:
        parts["weight.absmax"] = absmax
    text = json.dumps(facts).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return parts


def dequantize_parts(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What bitsandbytes gives for them."""
    facts = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    numbers = torch.stack([parts["weight"][:, 0] // 16, parts["weight"][:, 0] % 16], 1).flatten()
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        scales = parts["weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        absmax = parts["weight.nested_quant_map"][absmax.long()] * scales
        absmax = absmax + torch.tensor(facts["nested_offset"])
    count = torch.Size(facts["shape"]).numel()
    values = NF4[numbers[:count].long()] * absmax.repeat_interleave(64)[:count]
    return values.to(getattr(torch, facts["dtype"])).view(facts["shape"])


def save_nf4(plain: Path, folder: Path, double: bool = False) -> tuple[Path, Path]:
    """(NF4 checkpoint, plain checkpoint of the dequantized values) made of the base in `plain`.

    GPT-2's Conv1D weights are turned before they are quantized, as transformers does.
    """
    state = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    conv1d = config["model_type"] == "gpt2"
    stored: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stored[name] = rounded[name] = tensor
        if tensor.ndim == 2 and (".layers." in name or ".h." in name):
            parts = four_bit_parts(tensor.T if conv1d else tensor, double)
            stored |= {name.removesuffix("weight") + key: value for key, value in parts.items()}
            value = dequantize_parts(parts)
            rounded[name] = (value.T if conv1d else value).contiguous()
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for name, tensors, extra in (
        ("quantized", stored, {"quantization_config": settings}),
        ("rounded", rounded, {}),
    ):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**config, **extra}))
    return folder / "quantized", folder / "rounded"


def train(base: Path, folder: Path, steps: int = 8) -> Path:
    """A LoRA trained for a few steps on a plain base, in float32, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    ids = torch.randint(0, model.config.vocab_size, (4, 24))
    losses = []
    for _ in range(steps):
        loss = peft(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    peft.save_pretrained(folder)
    return folder
