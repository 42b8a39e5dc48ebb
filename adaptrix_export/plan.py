"""The data that everything else works on: what changes where, by reference to tensors on disk.

Nothing here reads a weight. A `Plan` is immutable; a pass takes one and returns another; lowering
turns one into bytes. Shapes are written as PyTorch has them: a Linear weight is (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy import dtype, ndarray

if TYPE_CHECKING:
    from adaptrix_export.load.architecture import Architecture


Array = ndarray[Any, dtype[Any]]


class Tensor(Protocol):
    """A tensor on disk: its header now, its values when lowering asks for them.

    `dtype` is a safetensors name (`F32`, `F16`, `BF16`, ...). `rows(i, j)` decodes rows i to j-1
    of the first axis only, so that a large matrix never has to be in memory whole.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Array: ...
    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True)
class Site:
    """A place that an adapter changes.

    `Site("model.layers", 7, "self_attn.q_proj")` is a module of one layer of a stack;
    `Site("", None, "lm_head")` is one outside any stack.
    """

    stack: str
    layer: int | None
    module: str

    @property
    def path(self) -> str:
        """The module path in the model, e.g. `model.layers.7.self_attn.q_proj`."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}.{self.module}"

    @property
    def order(self) -> tuple[str, int, str]:
        """Sort key: by stack, then by layer as a number (10 comes after 9), then by module."""
        return (self.stack, -1 if self.layer is None else self.layer, self.module)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class LowRank:
    """The term `scale * b @ a`, shape (out, in), from a (r, in) and b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to the weight at one site: the sum of its terms, shape (out, in)."""

    site: Site
    terms: tuple[LowRank, ...]


@dataclass(frozen=True)
class Replacement:
    """A parameter that an adapter ships whole (`modules_to_save`, saved embeddings)."""

    site: Site
    parameter: str  # "weight" or "bias"
    tensor: Tensor


@dataclass(frozen=True)
class Adapter:
    """One adapter, read from headers only."""

    name: str
    spec: str  # as the recipe named it
    folder: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    deltas: tuple[Delta, ...]
    replacements: tuple[Replacement, ...]

    @property
    def parameters(self) -> int:
        """Number of trained values that the adapter ships."""
        total = 0
        for delta in self.deltas:
            total += sum(_size(t.a.shape) + _size(t.b.shape) for t in delta.terms)
        return total + sum(_size(r.tensor.shape) for r in self.replacements)


@dataclass(frozen=True)
class Base:
    """A base model, read from headers only.

    `tensors` are named as transformers names them, in file order, whatever the file format.
    `tied` maps a tensor name to the stored tensor that it shares (`lm_head.weight` ->
    `model.embed_tokens.weight`); the first is then usually absent from `tensors`.
    """

    spec: str
    folder: Path
    gguf_file: str | None  # file name inside `folder` when the base is a GGUF file
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    tied: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """All that happens to one tensor: first replaced, then added to.

    `base` is None only for a tensor that the base does not have. `transposed` says that the
    base stores (in, out), as GPT-2's Conv1D does, so the delta is transposed before it is added.
    """

    name: str
    base: Tensor | None
    terms: tuple[LowRank, ...]
    replacement: Tensor | None
    transposed: bool
    site: Site

    @property
    def shape(self) -> tuple[int, ...]:
        source = self.replacement if self.replacement is not None else self.base
        assert source is not None, self.name
        return source.shape


@dataclass(frozen=True)
class Plan:
    """Base, adapters, and what the passes did, in order."""

    base: Base
    adapters: tuple[Adapter, ...]
    history: tuple[str, ...] = field(default=())

    def after(self, step: object, **changed: Any) -> Plan:
        """This plan with fields changed by `step`, whose repr becomes the history line."""
        return replace(self, history=(*self.history, repr(step)), **changed)

    def sites(self) -> tuple[Site, ...]:
        """Every site that some adapter changes, sorted."""
        found = {d.site for a in self.adapters for d in a.deltas}
        found |= {r.site for a in self.adapters for r in a.replacements}
        return tuple(sorted(found, key=lambda s: s.order))

    def changes(self) -> dict[str, Change]:
        """Tensor name -> what happens to it. Two adapters on one site add up.

        A changed tensor that was tied to another is no longer: the change of `lm_head.weight`
        then starts from the tensor it shared, and that one stays as it is.
        """
        changes: dict[str, Change] = {}

        def at(name: str, site: Site) -> Change:
            stored = self.base.tensors.get(name)
            if stored is None or name in self.base.tied:
                stored = self.base.tensors.get(self.base.tied.get(name, name))
            return changes.get(name) or Change(
                name, stored, (), None, self.base.architecture.is_transposed(site), site
            )

        for adapter in self.adapters:
            for saved in adapter.replacements:
                name = f"{saved.site.path}.{saved.parameter}"
                changes[name] = replace(at(name, saved.site), replacement=saved.tensor)
            for delta in adapter.deltas:
                name = f"{delta.site.path}.weight"
                change = at(name, delta.site)
                changes[name] = replace(change, terms=change.terms + delta.terms)
        return changes

    def untied(self) -> tuple[str, ...]:
        """Tensor names that the base shares and that this plan gives values of their own.

        Changing either end unties: a new `lm_head` must not reach the embedding, nor the other
        way round, because PEFT's live model keeps them apart.
        """
        changed = self.changes()
        return tuple(
            name for name, source in self.base.tied.items() if name in changed or source in changed
        )


Pass = Callable[[Plan], Plan]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def iter_terms(plan: Plan) -> Iterator[tuple[Adapter, Site, LowRank]]:
    """Every low-rank term with its adapter and site, in adapter order."""
    for adapter in plan.adapters:
        for delta in adapter.deltas:
            for term in delta.terms:
                yield adapter, delta.site, term
