"""Checks the types of fields of a base's config.json, and its sizes against the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.fields import (
    FLAG,
    NUMBER,
    OBJECT,
    SIZE,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    check_fields,
    list_of,
)
from adaptrix_export.plan import Base

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_DEPTHS = (
    *_LAYERS, "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "depth", "num_blocks", "vision_layers",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_AT_MOST = 4096
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
CONFIG_FIELDS: dict[str, Kind] = {
    **dict.fromkeys((*_LAYERS, *_WIDTHS), SIZE),
    **dict.fromkeys(_HEADS, SIZE | list_of(SIZE)),  # a number each stage: SegFormer, Swin
    **dict.fromkeys(("num_key_value_heads", "vocab_size", "head_dim"), SIZE),
    **dict.fromkeys(_IDS, WHOLE | list_of(WHOLE)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), OBJECT),
    **dict.fromkeys(("text_config", "vision_config", "id2label", "label2id"), OBJECT),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "layer_norm_eps"), NUMBER),
    "architectures": TEXTS,
    "dtype": TEXT | OBJECT,
    "hidden_act": TEXT,
    "intermediate_size": SIZE | list_of(SIZE),
    "layer_types": TEXTS,
    "max_position_embeddings": WHOLE,
    "model_type": TEXT,
    "sliding_window": WHOLE,
    "tie_word_embeddings": FLAG,
    "torch_dtype": TEXT | OBJECT,
}
# Types with separate projections of the usual names and heads * head size rows.
_PLAIN = frozenset(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 granite olmo2 starcoder2".split()
)
_NARROWED = (
    "word_embed_proj_dim",
    "embedding_size",
    "embedding_dim",
    "hidden_size_per_layer_input",
)


def check_config(place: str, config: Mapping[str, Any]) -> None:
    """Raise SourceError for a field whose type is not the one that transformers writes."""
    check_fields(f"{place}: config.json", config, CONFIG_FIELDS)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        check_fields(f"{place}: config.json: text_config", inner, CONFIG_FIELDS)


def check_counts(place: str, config: Mapping[str, Any], tensors: int, depth: int = 2) -> None:
    """Raise SourceError for more layers or experts than `tensors`, before a model of so many is
    built without values: each has a tensor at least, but for experts that share one."""
    for key, most in (*((k, tensors) for k in _DEPTHS), *((k, _EXPERTS_AT_MOST) for k in _EXPERTS)):
        value = config.get(key)
        if type(value) is int and not 0 <= value <= most:
            raise SourceError(
                f"{place}: config.json: {key}", str(value), f"at most {most}",
                "config and weights belong to different models; fetch both again",
            )  # fmt: skip
    for inner in config.values() if depth else ():
        if isinstance(inner, Mapping):
            check_counts(place, inner, tensors, depth - 1)


def check_sizes(base: Base) -> Base:
    """The base, or SourceError where sizes in its config.json are not those of its tensors."""
    for key, value, expected in _contradictions(base):
        raise SourceError(
            f"{base.spec}: config.json: {key}", str(value), expected,
            "config and weights belong to different models; fetch both again",
        )  # fmt: skip
    return base


def _contradictions(base: Base) -> Iterator[tuple[str, Any, str]]:
    """(key of the config, its value, the value by the tensors) for each contradiction."""
    config = base.config.get("text_config") or base.config
    table = base.tensors.get(f"{base.architecture.family.embedding}.weight")
    width_key, width = _first(config, _WIDTHS)
    narrowed = any(config.get(key) for key in _NARROWED)
    if table is not None and len(table.shape) == 2:
        rows, columns = table.shape
        if width is not None and not narrowed and width != columns:
            yield width_key, width, f"{columns}, the width of the embedding"
        if config.get("vocab_size") not in (None, rows):
            yield "vocab_size", config["vocab_size"], f"{rows}, the rows of the embedding"
    layers_key, layers = _first(config, _LAYERS)
    stacks = base.architecture.stacks
    if layers is not None and stacks and layers > stacks[0].count:
        yield layers_key, layers, f"{stacks[0].count}, the layers that have tensors"
    heads_key, heads = _first(config, _HEADS)
    if width is not None and heads is not None and not config.get("head_dim") and width % heads:
        yield heads_key, heads, f"a divisor of {width_key} {width}"
    positions = config.get("max_position_embeddings")
    size = config.get("head_dim") or (width // heads if width and heads else 0)
    most = _most_positions(base, size)
    if isinstance(positions, int) and positions > most:
        yield "max_position_embeddings", positions, f"at most {most} for a model of this size"
    if str(config.get("model_type")) in _PLAIN and heads and width:
        yield from _projections(base, config, heads, width)


def _most_positions(base: Base, head_size: int) -> int:
    """A graph holds a table of sines for each position: in 32 bits, and not larger than the
    weights, or than 100 MB."""
    stored = sum(prod(tensor.shape) for tensor in base.tensors.values())
    return max(25_000_000, stored) // max(1, head_size)


def _projections(
    base: Base, config: Mapping[str, Any], heads: int, width: int
) -> Iterator[tuple[str, Any, str]]:
    size = config.get("head_dim") or width // heads
    shared = config.get("num_key_value_heads") or heads
    if heads % shared:
        yield "num_key_value_heads", shared, f"a divisor of {heads} heads"
    for ending, key, value, rows in (
        ("self_attn.q_proj.weight", "num_attention_heads", heads, heads * size),
        ("self_attn.k_proj.weight", "num_key_value_heads", shared, shared * size),
        ("mlp.up_proj.weight", "intermediate_size", config.get("intermediate_size"), None),
    ):
        name = next((name for name in base.tensors if name.endswith(f".0.{ending}")), None)
        if name is None or not isinstance(value, int):
            continue
        actual, expected = base.tensors[name].shape[0], value if rows is None else rows
        if actual != expected:
            yield key, value, f"what gives {name} its {actual} rows, not {expected}"


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of `keys` that is set, and its value; a list, one number a stage, is no value."""
    key = next((k for k in keys if config.get(k) is not None), keys[0])
    value = config.get(key)
    return key, None if isinstance(value, list) else value
