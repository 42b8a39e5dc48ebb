"""Adapters of other formats, written by hand from the factors of a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def factors(adapter: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> {a, b, m} of a PEFT folder."""
    parts = {
        "lora_A.weight": "a",
        "lora_B.weight": "b",
        "lora_magnitude_vector": "m",
        "lora_embedding_A": "a",
        "lora_embedding_B": "b",
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        ending = next(e for e in parts if key.endswith("." + e))
        module = key.removeprefix(PREFIX).removesuffix("." + ending)
        found.setdefault(module, {})[parts[ending]] = value
    return found


def as_mlx(adapter: Path, folder: Path, scale: float, **changed: object) -> Path:
    folder.mkdir()
    tensors = {}
    modules = factors(adapter)
    for module, part in modules.items():
        tensors[f"{module}.lora_a"] = part["a"].T.contiguous()
        tensors[f"{module}.lora_b"] = part["b"].T.contiguous()
        if "m" in part:
            tensors[f"{module}.m"] = part["m"]
    save_file(tensors, folder / "adapters.safetensors")
    rank = next(iter(modules.values()))["a"].shape[0]
    config = {
        "fine_tune_type": "dora" if "m" in part else "lora",
        "num_layers": 4,
        "model": "/home/someone/model",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
        **changed,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def as_gguf(
    adapter: Path,
    path: Path,
    alpha: float,
    kind: str = "llama",
    heads: tuple[int, int] = (4, 2),
    permute: bool = True,
    half: bool = False,
    **metadata: str,
) -> Path:
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type(metadata.get("type", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, metadata.get("of", "lora"))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if "invocation" in metadata:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [1, 2])
    width = np.float16 if half else np.float32
    for module, part in factors(adapter).items():
        a, b = part["a"].numpy().astype(width), part["b"].numpy().astype(width)
        if module == "model.embed_tokens":
            name, a = "token_embd", np.ascontiguousarray(a.T)
        else:
            layer, inner = module.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{GGUF_NAMES[inner]}"
            if permute and GGUF_NAMES[inner] in ("attn_q", "attn_k"):
                b = permuted(b, heads[GGUF_NAMES[inner] == "attn_k"])
        writer.add_tensor(f"{name}.weight.lora_a", a)
        writer.add_tensor(f"{name}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_adaptrix(
    adapter: Path,
    folder: Path,
    entry: dict[str, object],
    renames: dict[str, str] | None = None,
    **changed: object,
) -> Path:
    """`entry` is what each module stores beside its factors: the numbers of one writer or other."""
    folder.mkdir()
    layers: dict[int, dict[str, dict[str, object]]] = {}
    for module, part in factors(adapter).items():
        layer, inner = module.split(".layers.")[1].split(".", 1)
        inner = (renames or {}).get(inner, inner)
        layers.setdefault(int(layer), {})[inner] = {
            "lora_A": part["a"],
            "lora_B": part["b"],
            **entry,
        }
    for layer, modules in layers.items():
        torch.save(modules, folder / f"layer_{layer}.pt")
    metadata = {
        "name": "tone",
        "version": "2.1",
        "target_layers": sorted(layers),
        "rank": 4,
        "alpha": 7,
        "target_modules": sorted({m for modules in layers.values() for m in modules}),
        "author": "someone",
        **changed,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder
