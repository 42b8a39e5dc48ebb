"""The architecture of a base model: stacks of layers, sizes, and how weights are stored.

Sizes come from the model's config, whose names for them differ by type; stacks come from the tensor
names; the rest (Conv1D weights, names of embedding and head) is in `families.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaptrix_export.arch.families import LIVE, Family, family_of
from adaptrix_export.arch.tasks import FEATURES, GENERATION
from adaptrix_export.errors import SourceError
from adaptrix_export.plan import Site

if TYPE_CHECKING:
    from adaptrix_export.arch.skeleton import Skeleton


@dataclass(frozen=True)
class Stack:
    """A run of layers: `Stack("model.layers", 30)`."""

    prefix: str
    count: int


@dataclass(frozen=True)
class Architecture:
    """Facts about a base model; sizes in elements."""

    model_type: str
    family: Family
    stacks: tuple[Stack, ...]
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    vocab_size: int
    max_positions: int | None
    _prefixes: frozenset[str] = field(default=frozenset(), repr=False)

    def site_of(self, module_path: str) -> Site:
        """`model.layers.7.self_attn.q_proj` -> Site("model.layers", 7, "self_attn.q_proj")."""
        stack, layer, module = split_path(module_path)
        if layer is None or stack not in self._prefixes:
            return Site("", None, module_path)
        return Site(stack, layer, module)

    def is_transposed(self, site: Site) -> bool:
        """Whether the base stores this site's weight as (in, out): Conv1D, and embeddings."""
        conv1d = self.family.conv1d and site.layer is not None
        return conv1d or self.is_embedding(site) or site.path in self.family.turned

    def is_embedding(self, site: Site) -> bool:
        """Whether the site is an embedding."""
        return site.path in self.family.embeddings

    def middle_layers(self, stack: int = 0) -> tuple[int, ...]:
        """n/4, n/2, 3n/4 of one stack: where the original system injects."""
        n = self.stacks[stack].count if self.stacks else 0
        return tuple(sorted({n // 4, n // 2, 3 * n // 4} & set(range(n))))


def split_path(path: str) -> tuple[str, int | None, str]:
    """Split at the first component that is a number: (stack, layer, rest)."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and 0 < i < len(parts) - 1:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return path, None, ""


def detect(
    config: Mapping[str, Any],
    names: Iterable[str],
    place: str,
    task: str = GENERATION,
    skeleton: Skeleton | None = None,
) -> Architecture:
    """The architecture of a checkpoint from its config.json and its tensor names, or from the
    skeleton of its live model, if it has one.

    Raises SourceError if the config lacks a model type or a required size.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(
            f"{place}: config.json", "no model_type", "one", "is this a transformers checkpoint?"
        )
    stacks = _stacks(names)
    if skeleton is not None:
        return _of_skeleton(model_type, stacks, skeleton)
    text = config.get("text_config") or config
    sizes = size_fields(text)
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        value = getattr(sizes, key)
        if not isinstance(value, int):
            raise SourceError(f"{place}: config.json", f"{key} = {value}", "a number")
    heads = sizes.num_attention_heads
    family = family_of(model_type)
    return Architecture(
        model_type=model_type,
        family=family.bare() if task == FEATURES else family,
        stacks=stacks,
        hidden_size=sizes.hidden_size,
        attention_heads=heads,
        key_value_heads=sizes.num_key_value_heads or heads,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.max_position_embeddings,
        _prefixes=frozenset(s.prefix for s in stacks),
    )


def _of_skeleton(model_type: str, stacks: tuple[Stack, ...], skeleton: Skeleton) -> Architecture:
    """Sizes that the model does not have, such as a vocabulary, are 0."""
    sizes = size_fields(skeleton.text)
    heads = _number(sizes.num_attention_heads)
    family = Family(
        prefix=skeleton.prefix,
        embedding=skeleton.embedding,
        head=skeleton.head,
        shape=LIVE,
        embeddings=skeleton.embeddings,
        turned=skeleton.turned,
    )
    return Architecture(
        model_type=model_type,
        family=family,
        stacks=stacks,
        hidden_size=_number(sizes.hidden_size),
        attention_heads=heads,
        key_value_heads=_number(sizes.num_key_value_heads) or heads,
        vocab_size=_number(sizes.vocab_size),
        max_positions=_number(sizes.max_position_embeddings) or None,
        _prefixes=frozenset(s.prefix for s in stacks),
    )


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _stacks(names: Iterable[str]) -> tuple[Stack, ...]:
    """All numbered lists of modules, the longest first."""
    layers: dict[str, set[int]] = {}
    for name in names:
        stack, layer, _ = split_path(name)
        if layer is not None:
            layers.setdefault(stack, set()).add(layer)
    whole = [Stack(p, len(n)) for p, n in layers.items() if n == set(range(len(n)))]
    return tuple(sorted(whole, key=lambda s: (-s.count, s.prefix)))


# What configs call a size, by type. A test compares with the table of optimum.
_SPELLINGS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "attention_heads",
        "decoder_attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_target_positions",
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes as the config has them: unchecked values, None where it has none."""

    hidden_size: Any
    num_attention_heads: Any
    num_key_value_heads: Any
    vocab_size: Any
    max_position_embeddings: Any


def size_fields(config: Mapping[str, Any]) -> Sizes:
    """The sizes of a config.json, whatever it calls them."""
    return Sizes(
        **{
            key: next((config[s] for s in spellings if config.get(s) is not None), None)
            for key, spellings in _SPELLINGS.items()
        }
    )
