"""A LoRA in llama.cpp's format: a GGUF file of type adapter.

The tensors have llama.cpp's names. The converter permutes the rows of `lora_b` of LLaMA's q and k
like those of the base's weight. For the token embedding, `lora_a` has a row for each token.
Sources: convert_lora_to_gguf.py, llama-adapter.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.peft_form import Factors, foreign_adapter
from adaptrix_export.load.adapters.peft_keys import module_paths, one_site
from adaptrix_export.load.files.gguf_header import GgufHeader, read_gguf
from adaptrix_export.load.files.views import Transposed
from adaptrix_export.load.quantized.gguf_base import (
    ARCHITECTURES,
    DequantizedTensor,
    check_gguf,
    model_name,
)
from adaptrix_export.load.reading import Reading
from adaptrix_export.load.source import Source
from adaptrix_export.plan import Adapter, Base, LowRank

# GGUF architecture -> the supported model types that llama.cpp converts to it.
_MODEL_TYPES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
_REFUSED = {"adapter.alora.invocation_tokens": "an activated LoRA, which depends on the prompt"}


def open_gguf_adapter(source: Source, base: Base, place: str, reading: Reading) -> Adapter:
    """Read the header of a GGUF LoRA.

    Raises UnsupportedError for other kinds of GGUF file, AdapterError for an adapter of another
    architecture or a tensor without a module or a partner.
    """
    assert source.gguf_file is not None
    path = source.folder / source.gguf_file
    header = read_gguf(path)
    check_gguf(place, header.metadata)
    kind, alpha = _kind(place, header, base)
    factors: dict[str, dict[str, DequantizedTensor]] = {}
    modules = module_paths(base)
    for stored in header.tensors:
        weight, _, part = stored.name.rpartition(".")
        if part not in ("lora_a", "lora_b") or len(stored.shape) != 2:
            raise UnsupportedError(
                f"{place}: {stored.name}", f"shape {list(stored.shape)}", "matrices lora_a, lora_b",
                "llama.cpp itself skips or refuses it",
            )  # fmt: skip
        name, block = model_name(place, weight)
        module = one_site(place, stored.name, tuple(name.split(".")[:-1]), modules)
        heads = _heads(base, block) if ARCHITECTURES[kind] and part == "lora_b" else 0
        if heads and stored.shape[0] % (2 * heads):
            raise AdapterError(
                f"{place}: {stored.name}", f"{stored.shape[0]} rows", f"rows for {heads} heads",
                "was this adapter trained on another model?",
            )  # fmt: skip
        tensor = DequantizedTensor(stored.name, path, stored, heads)
        factors.setdefault(module, {})[part] = tensor
    embedding = base.architecture.family.embedding
    terms = {m: _term(place, m, p, alpha, m == embedding) for m, p in factors.items()}
    metadata = {"format": "gguf", "gguf": _plain(header.metadata)}
    return foreign_adapter(place, source.spec, (path,), base, terms, metadata)


def _kind(place: str, header: GgufHeader, base: Base) -> tuple[str, float]:
    """(architecture, alpha) of a LoRA for this base."""
    metadata = header.metadata
    kinds = (metadata.get("general.type"), metadata.get("adapter.type"))
    if kinds != ("adapter", "lora"):
        raise UnsupportedError(
            place, f"a GGUF file of type {kinds[0]!r} and adapter type {kinds[1]!r}",
            "an adapter of type lora", "a whole model goes to --base",
        )  # fmt: skip
    for key, what in _REFUSED.items():
        if key in metadata:
            raise UnsupportedError(f"{place}: {key}", what, "a plain LoRA", "serve it unmerged")
    kind = metadata.get("general.architecture")
    if kind not in _MODEL_TYPES:
        raise UnsupportedError(
            place, f"GGUF architecture {kind!r}", " ".join(_MODEL_TYPES),
            "use the adapter's PEFT folder",
        )  # fmt: skip
    if base.architecture.model_type not in _MODEL_TYPES[kind]:
        raise AdapterError(
            place, f"an adapter for {kind}", f"one for {base.architecture.model_type}",
            "was this adapter trained on another model?",
        )  # fmt: skip
    alpha = metadata.get("adapter.lora.alpha")
    if type(alpha) is not float:
        raise AdapterError(place, f"adapter.lora.alpha = {alpha!r}", "a number", "convert it again")
    return kind, alpha


def _heads(base: Base, block: str) -> int:
    """Number of heads whose rows are permuted in this tensor; 0 for none."""
    kind = base.architecture
    return {"attn_q": kind.attention_heads, "attn_k": kind.key_value_heads}.get(block, 0)


def _term(
    place: str, module: str, parts: Mapping[str, DequantizedTensor], alpha: float, embedding: bool
) -> Factors:
    if len(parts) != 2:
        missing = "lora_b" if "lora_a" in parts else "lora_a"
        raise AdapterError(f"{place}: {module}", f"no {missing}", "both factors", "convert again")
    b = parts["lora_b"]
    a = Transposed(parts["lora_a"], by_format=True) if embedding else parts["lora_a"]
    rank = b.shape[1]
    if a.shape[0] != rank:
        raise AdapterError(
            f"{place}: {module}", f"rank {a.shape[0]} in lora_a and {rank} in lora_b", "one rank"
        )
    # llama_adapter_lora_weight::get_scale takes an alpha of 0 for "no scaling".
    return LowRank(a, b, alpha / rank if alpha else 1.0)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The header's metadata without its lists."""
    return {k: v for k, v in sorted(metadata.items()) if not isinstance(v, list)}
