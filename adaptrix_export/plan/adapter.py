"""An adapter, read from headers: deltas, replacements, and adjustments made while reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.plan.site import Site
from adaptrix_export.plan.tensor import Tensor
from adaptrix_export.plan.terms import Term


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one parameter of a site: the sum of its terms."""

    site: Site
    terms: tuple[Term, ...]
    parameter: str = "weight"

    @property
    def name(self) -> str:
        return f"{self.site.path}.{self.parameter}"


@dataclass(frozen=True)
class Replacement:
    """A parameter, or some rows of one, that an adapter replaces.

    `shared`: the values replace those of the base's own parameter, and tied tensors follow (saved
    biases, resized embeddings, trained token rows); otherwise the adapter has its own copy of the
    module (`modules_to_save`). `rows` of None means all rows.
    """

    site: Site
    parameter: str  # "weight" or "bias"
    tensor: Tensor
    shared: bool = False
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.site.path}.{self.parameter}"


@dataclass(frozen=True)
class Prompt:
    """What an adapter learned in place of weights: a row for each virtual token.

    A row has the model's width, or, with `layers` > 0, is every layer's key and value in turn,
    of `heads` heads each.
    """

    tensor: Tensor
    layers: int = 0
    heads: int = 0

    @property
    def tokens(self) -> int:
        return self.tensor.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One adapter, read from headers only."""

    name: str
    spec: str  # as the recipe named it
    folder: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]  # adapter_config.json, or an equivalent one for other formats
    deltas: tuple[Delta, ...]
    replacements: tuple[Replacement, ...]
    # Notes for the user on how the files were read.
    notes: tuple[str, ...] = ()
    # Stock PEFT would read the files otherwise: the oracle gets a copy in PEFT's format.
    foreign: bool = False
    # `format` of the files, and that format's own metadata.
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # Module of the base -> its path in the files, where the two differ.
    written: Mapping[str, str] = field(default_factory=dict)
    # A copy that PEFT can read, made while opening, for tuners that PEFT's layers merge.
    peft_copy: Path | None = None
    prompt: Prompt | None = None
    shared: tuple[Tensor, ...] = ()  # tensors that many sites use, such as VeRA's projections

    @property
    def parameters(self) -> int:
        """Number of trained values that the adapter ships."""
        tensors = [t for d in self.deltas for term in d.terms for t in term.tensors]
        tensors += [*self.shared, *([self.prompt.tensor] if self.prompt else [])]
        return sum(prod(t.shape) for t in (*tensors, *(r.tensor for r in self.replacements)))


@dataclass(frozen=True)
class Adjustment:
    """A part of an adapter that is applied in another form than it is stored in, or dropped.

    `kind` is "transposed", "renamed", "split", "stacked", "vocabulary" or "dropped"; `place` is
    the module as the adapter names it.
    """

    adapter: str
    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.adapter}: {self.place}: {self.text}"
