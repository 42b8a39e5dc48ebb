"""A GGUF file as a base: tensors dequantized to float32 under transformers' names.

llama.cpp renames the tensors and, for LLaMA, permutes the rows of q and k for its rotary embedding
(convert_hf_to_gguf.py, `permute`); both are reverted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.base_model import make_base
from adaptrix_export.load.files.fields import (
    COUNT,
    NUMBER,
    SIZE,
    TEXT,
    Kind,
    check_fields,
    list_of,
)
from adaptrix_export.load.files.gguf_header import GgufHeader, GgufTensor, read_gguf, stored_bytes
from adaptrix_export.load.files.tensors import ByRows
from adaptrix_export.load.quantized.gguf_blocks import (
    FORMATS,
    GgufFormat,
    StoredBlocks,
    blocks_of,
)
from adaptrix_export.plan import Array

if TYPE_CHECKING:
    from adaptrix_export.load.source import Source
    from adaptrix_export.plan import Base


@dataclass(frozen=True)
class GgufArchitecture:
    """`reordered`: llama.cpp permutes the rows of q and k."""

    causal_lm: str
    reordered: bool = False


# By name of the architecture, the same in GGUF and transformers; others are refused.
ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", reordered=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM"),
}

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class DequantizedTensor(ByRows):
    """A GGUF tensor that reads as float32; `heads` > 0: the rows of that many heads are
    permuted."""

    name: str
    path: Path
    stored: GgufTensor
    heads: int = 0
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Array:
        if not self.heads:
            return self._stored_rows(start, stop)
        order = _row_order(self.shape[0], self.heads)[start:stop]
        if not len(order):
            return self._stored_rows(0, 0)
        first = int(order.min())
        return self._stored_rows(first, int(order.max()) + 1)[order - first]

    @property
    def format(self) -> GgufFormat | None:
        """How its codes are stored; None for formats that no operator reads as they are."""
        return FORMATS.get(self.stored.ggml_type) if len(self.shape) == 2 else None

    def blocks(self) -> StoredBlocks:
        """All rows as they are stored, in the model's order; it must have a `format`."""
        assert self.format is not None, self.name
        raw = self._bytes(0, self.shape[0])
        if self.heads:
            raw = raw[_row_order(self.shape[0], self.heads)]
        return blocks_of(raw, self.format)

    def _stored_rows(self, start: int, stop: int) -> Array:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = self._bytes(start, stop)
        kind = GGMLQuantizationType(self.stored.ggml_type)
        values = dequantize(raw, kind).astype(np.float32, copy=False)
        result: Array = values.reshape(stop - start, *self.shape[1:])
        return result

    def _bytes(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        row = stored_bytes(self.path.name, self.stored) // self.shape[0]
        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * row, offset=self.stored.offset + start * row
        )
        if raw.size != (stop - start) * row:
            raise SourceError(
                f"{self.path.name}: {self.name}", f"{raw.size} bytes", f"{(stop - start) * row}"
            )
        return raw.reshape(stop - start, row)


def _row_order(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Stored row of model row i: the file interleaves the two rotary halves of each head."""
    order: np.ndarray[Any, np.dtype[np.int64]] = np.arange(rows, dtype=np.int64)
    return order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def open_gguf(source: Source, file_name: str) -> Base:
    """Read the header of a GGUF base. Raises UnsupportedError for unsupported files."""
    path = source.folder / file_name
    header = read_gguf(path)
    check_gguf(source.spec, header.metadata)
    kind = header.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            source.spec, f"GGUF architecture {kind!r}", " ".join(ARCHITECTURES),
            "use the model's safetensors checkpoint",
        )  # fmt: skip
    if header.metadata.get("split.count", 1) != 1:
        raise UnsupportedError(
            source.spec, "one part of a split GGUF file", "a single file", "join the parts first"
        )
    config = _config(source, kind, header)
    tensors = {}
    for stored in header.tensors:
        name, part = model_name(source.spec, stored.name)
        heads = 0
        if ARCHITECTURES[kind].reordered and part in ("attn_q", "attn_k"):
            key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            heads = config[key]
        tensors[name] = DequantizedTensor(name, path, stored, heads)
    return make_base(source, (path,), config, tensors)


def check_gguf(place: str, metadata: Mapping[str, Any]) -> None:
    """Raise SourceError for a field of another type than llama.cpp's converter writes."""
    check_fields(f"{place}: metadata", metadata, _FIELDS)
    kind = metadata.get("general.architecture")
    sizes = {f"{kind}.{key}": SIZE for key in (*_SIZES, *_MORE_SIZES)}
    sizes |= {f"{kind}.{key}": NUMBER for key in _NUMBERS}
    check_fields(f"{place}: metadata", metadata, {**sizes, f"{kind}.rope.scaling.type": TEXT})


def model_name(spec: str, stored: str) -> tuple[str, str]:
    """`blk.7.attn_q.weight` -> (`model.layers.7.self_attn.q_proj.weight`, `attn_q`)."""
    match stored.split("."):
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in _BLOCK:
            return f"model.layers.{layer}.{_BLOCK[part]}.{kind}", part
        case [part, ("weight" | "bias") as kind] if part in _TOP:
            return f"{_TOP[part]}.{kind}", part
    raise UnsupportedError(
        f"{spec}: {stored}", "a tensor without a counterpart in transformers", "a known name",
        "use the model's safetensors checkpoint",
    )  # fmt: skip


def _config(source: Source, kind: str, header: GgufHeader) -> dict[str, Any]:
    """config.json from the file's metadata, as transformers converts it; torch is not imported."""
    metadata = header.metadata
    if metadata.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise UnsupportedError(
            source.spec, f"rope scaling {metadata[f'{kind}.rope.scaling.type']!r}", "none",
            "transformers does not read it from GGUF; use the model's safetensors checkpoint",
        )  # fmt: skip
    sizes: dict[str, Any] = {name: metadata.get(f"{kind}.{key}") for key, name in _SIZES.items()}
    missing = next((n for n, v in sizes.items() if not isinstance(v, (int, float))), None)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if missing or not isinstance(tokens, list):
        raise SourceError(
            source.spec, f"no {missing or 'vocabulary'} in the metadata", "a model's GGUF file"
        )
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    ids = {
        f"{n}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for n, key in _IDS.items()
    }
    theta = metadata.get(f"{kind}.rope.freq_base", 10000.0)
    return {
        "architectures": [ARCHITECTURES[kind].causal_lm],
        "model_type": kind,
        **sizes,
        "num_key_value_heads": metadata.get(
            f"{kind}.attention.head_count_kv", sizes["num_attention_heads"]
        ),
        "head_dim": metadata.get(
            f"{kind}.attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"]
        ),
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "vocab_size": embedding.shape[0] if embedding else len(tokens),
        "tie_word_embeddings": all(t.name != "output.weight" for t in header.tensors),
        **{key: value for key, value in ids.items() if isinstance(value, int)},
        "dtype": "float32",  # of the dequantized weights
    }


_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_MORE_SIZES = ("attention.head_count_kv", "attention.key_length")
_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("general.architecture", "general.type", "adapter.type"), TEXT),
    **{f"tokenizer.ggml.{key}_token_id": COUNT for key in _IDS.values()},
    "adapter.lora.alpha": NUMBER,
    "split.count": COUNT,
    "tokenizer.ggml.tokens": list_of(TEXT, 2_000_000),
}
