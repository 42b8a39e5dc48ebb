"""The rows of each projection in fused weights.

The rows of a fused Linear are independent outputs, so LoRA on the whole equals LoRA on each part
with the part's rows of B, and LoRA on the parts equals a sum on the whole, each with zeros in the
other parts' rows of B. That holds only for parts of consecutive rows; weights that interleave them
by head (`query_key_value` of GPT-NeoX, Falcon and Bloom, CodeGen's `qkv_proj`) are in no table
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.plan import Base

_QKV = ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_GATE_UP = ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))

# Model type -> (fused module, its parts in the order of rows), from transformers' modeling files:
# phi3 slices query, key, value in this order; all three `gate, up = chunk(2)`.
FUSED_BASES = {"phi3": (_QKV, _GATE_UP), "glm": (_GATE_UP,), "glm4": (_GATE_UP,)}
# Fused modules of adapters for bases with separate parts: no model of transformers uses these names
# for another order of rows.
FUSED_ADAPTERS = (_QKV, _GATE_UP)
# Fused weights whose parts are interleaved, or whose order is unknown.
_MIXED = ("query_key_value", "qkv_proj", "gate_up_proj", "c_attn", "Wqkv", "in_proj_weight")


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` - 1 of the fused module `whole` are the module `name`."""

    whole: str
    name: str
    start: int
    stop: int


def parts_in_base(base: Base, stack: str, layer: int | None) -> dict[str, Part]:
    """Part name -> its rows in this layer's fused weights, for a base that fuses them.

    Empty if the sizes in the config do not add up to the stored rows.
    """
    parts: dict[str, Part] = {}
    for whole, names in FUSED_BASES.get(base.architecture.model_type, ()):
        stored = base.tensors.get(f"{stack}.{layer}.{whole}.weight")
        sizes = _sizes(base, len(names), stored.shape[0]) if stored else ()
        if stored and sum(sizes) == stored.shape[0]:
            parts.update({p.name: p for p in _layout(whole, names, sizes)})
    return parts


def parts_of(base: Base, stack: str, layer: int | None, whole: str) -> tuple[Part, ...]:
    """The base's modules that correspond to an adapter's fused module `whole`; may be empty."""
    names = dict(FUSED_ADAPTERS).get(whole, ())
    stored = [base.tensors.get(f"{stack}.{layer}.{name}.weight") for name in names]
    return _layout(whole, names, [t.shape[0] for t in stored if t]) if all(stored) else ()


def fused_hint(base: Base, path: str) -> str:
    """A remedy for a missing module that the base has as part of a fused weight."""
    parent = path.rpartition(".")[0]
    for name in _MIXED:
        if f"{parent}.{name}.weight" in base.tensors and not path.endswith(name):
            return (
                f"this base keeps it inside {name}, where this adapter cannot be placed exactly; "
                f"train on {name}"
            )
    return ""


def _sizes(base: Base, count: int, rows: int) -> tuple[int, ...]:
    """Rows of query, key, value by the config; of gate and up, two halves."""
    if count == 2:
        return (rows // 2, rows // 2)
    kind = base.architecture
    width = base.config.get("head_dim") or kind.hidden_size // kind.attention_heads
    return (kind.attention_heads * width, *[kind.key_value_heads * width] * 2)


def _layout(
    whole: str, names: tuple[str, ...], sizes: list[int] | tuple[int, ...]
) -> tuple[Part, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Part(whole, name, start, start + size)
        for name, start, size in zip(names, starts, sizes, strict=True)
    )
