"""Adapters that learn a prompt and no weights: prompt tuning, p-tuning, prefix tuning.

PEFT saves what its encoder made of the virtual tokens, one tensor `prompt_embeddings`: a row of the
model's width for each token, or for a prefix a row of every layer's key and value. No weight can
hold that; a graph can (`graph/rewrite/virtual_tokens.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.stored_weights import StoredWeights
from adaptrix_export.plan import Adapter, Base, Prompt

KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
PREFIX = "PREFIX_TUNING"
TENSOR = "prompt_embeddings"


def open_prompt(
    place: str,
    spec: str,
    folder: Path,
    config: Mapping[str, Any],
    base: Base,
    weights: StoredWeights,
) -> Adapter:
    """The adapter, from its headers. Raises UnsupportedError for a base that is no decoder,
    AdapterError for a prompt of another model's sizes."""
    kind = str(config.get("peft_type"))
    if base.task != GENERATION:
        raise UnsupportedError(
            f"{place}: {kind}", f"a base for {base.task}", "a decoder that generates",
            "serve it with PEFT, or train a LoRA for the same task",
        )  # fmt: skip
    others = sorted(tensor.name for tensor in weights.tensors if tensor.name != TENSOR)
    stored = next((tensor for tensor in weights.tensors if tensor.name == TENSOR), None)
    if stored is None or others or len(stored.shape) != 2:
        raise AdapterError(
            f"{place}: {kind}", others[0] if others else f"no matrix {TENSOR}",
            f"{TENSOR} alone", "save it again with PEFT",
        )  # fmt: skip
    architecture = base.architecture
    layers = architecture.stacks[0].count if architecture.stacks else 0
    pieces = 2 * layers * architecture.key_value_heads if kind == PREFIX else 1
    size = _head_size(base) if kind == PREFIX else architecture.hidden_size
    if stored.shape[1] != pieces * size:
        raise AdapterError(
            f"{place}: {TENSOR}", f"rows of {stored.shape[1]}",
            f"{pieces * size}, as the base has it", "was it trained on another model?",
        )  # fmt: skip
    prompt = Prompt(
        stored, layers if kind == PREFIX else 0, architecture.key_value_heads if layers else 0
    )
    return Adapter(
        name=place,
        spec=spec,
        folder=folder,
        files=(folder / "adapter_config.json", *weights.files),
        config=config,
        deltas=(),
        replacements=(),
        notes=(f"{prompt.tokens} virtual tokens ({prod(stored.shape)} values)", *weights.notes),
        prompt=prompt,
    )


def _head_size(base: Base) -> int:
    found = base.config.get("head_dim")
    return int(found or base.architecture.hidden_size // base.architecture.attention_heads)
