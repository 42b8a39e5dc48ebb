"""A small random model of the same kind as a large one, for trying a front end on.

Fewer layers, fewer heads, narrower, a smaller vocabulary; the size of a head, the pattern of the
layers and every option of the architecture stay. Ranges (a sliding window, the original range of
scaled rotary embeddings) shrink, so that short prompts go beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYERS = 2  # more where the layers differ: one of each kind at least
HEADS, WIDTH, VOCABULARY, EXPERTS = 4, 96, 256, 4
WINDOW, POSITIONS, ORIGINAL = 12, 256, 32

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
# Where these equal the width, the model has no projection between the two.
_AS_WIDE = ("word_embed_proj_dim", "embedding_size")
_INNER = ("intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim", "ffn_hidden_size",
          "d_ff", "hidden_dim")  # fmt: skip
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(_INNER, WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), EXPERTS // 2),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "local_attention", "window_size"), WINDOW
    ),
    "relative_attention_max_distance": 40,  # T5: beyond, all distances share a bucket
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), POSITIONS),
    "vocab_size": VOCABULARY,
}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_RANGE = "original_max_position_embeddings"


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same structure; the same one for models that differ in size alone."""
    small = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    count = next((config[k] for k in _COUNTS if isinstance(config.get(k), int)), None)
    if count is not None:
        layers = _layers_kept(config, count)
        for key, value in config.items():
            if key in _COUNTS and value == count:
                small[key] = layers
            elif isinstance(value, list) and len(value) == count and count > layers:
                small[key] = value[:layers]
    _shrink_heads(small)
    for key, most in _AT_MOST.items():
        if isinstance(small.get(key), int) and not isinstance(small[key], bool):
            small[key] = min(small[key], most)
    for key in _IDS:
        if isinstance(small.get(key), int):
            small[key] = min(small[key], small.get("vocab_size", VOCABULARY) - 1)
    _shrink_ranges(small, config)
    return small


def _layers_kept(config: Mapping[str, Any], count: int) -> int:
    """Layers from the first on until each kind that a list or a period names has come."""
    layers = LAYERS
    for value in config.values():
        if isinstance(value, list) and len(value) == count:
            first = {repr(kind): place for place, kind in reversed(list(enumerate(value)))}
            layers = max(layers, 1 + max(first.values()))
    for key in ("sliding_window_pattern", "no_rope_layer_interval", "first_k_dense_replace",
                "global_attn_every_n_layers", "decoder_sparse_step"):  # fmt: skip
        if isinstance(config.get(key), int):
            layers = max(layers, config[key] + 1)
    return min(layers, count)


def _shrink_heads(small: dict[str, Any]) -> None:
    """Fewer heads of the same size, grouped as they were: alone, in groups, or all as one."""
    name = next((k for k in _HEADS if isinstance(small.get(k), int)), None)
    width = next((k for k in _HIDDEN if isinstance(small.get(k), int)), None)
    if name is None or width is None:
        return
    heads, hidden = small[name], small[width]
    few = min(heads, HEADS)
    shared = small.get("num_key_value_heads")
    if isinstance(shared, int):
        groups = few if shared == heads else max(1, min(few // 2, shared))
        small["num_key_value_heads"] = groups
    small[name] = few
    if hidden % heads == 0:
        small[width] = few * (hidden // heads)
        small |= {name: small[width] for name in _AS_WIDE if small.get(name) == hidden}


def _shrink_ranges(small: dict[str, Any], config: Mapping[str, Any]) -> None:
    """The original range of scaled rotary embeddings, and the positions in proportion to it."""
    whole = config.get("max_position_embeddings")
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(key), Mapping):
            small[key] = {
                k: dict(v) if isinstance(v, Mapping) else v for k, v in small[key].items()
            }
    places = [small]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(key), dict):
            places += [small[key], *(v for v in small[key].values() if isinstance(v, dict))]
    for place in places:
        if place.get("rope_type", place.get("type")) == "dynamic" and isinstance(whole, int):
            small["max_position_embeddings"] = min(whole, ORIGINAL)  # its range is this very number
            continue
        original = place.get(_RANGE)
        if isinstance(original, int) and original > ORIGINAL:
            place[_RANGE] = ORIGINAL
            if isinstance(whole, int):
                small["max_position_embeddings"] = max(POSITIONS, whole * ORIGINAL // original)


def save_replica(config: Mapping[str, Any], task: str, folder: Path) -> None:
    """A model of that config with weights large enough that a mistake shows, as a checkpoint.

    Norms are not one, biases not zero, and logits of a size that soft caps bend.
    """
    import torch
    import transformers

    from adaptrix_export.arch.tasks import TASKS

    torch.manual_seed(0)
    auto: Any = getattr(transformers, TASKS[task].auto)
    model = auto.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
        table = model.get_input_embeddings().weight
        table.normal_(std=4 / table.shape[-1] ** 0.5)  # tied logits are then about 4
    model.save_pretrained(folder)
