"""The kinds of terms that a delta is a sum of; evaluated by `merge`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adaptrix_export.plan.base import Base
from adaptrix_export.plan.tensor import Tensor


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
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Dora:
    """DoRA, https://arxiv.org/abs/2402.09353: m / |W + scale b a| * (W + scale b a) - W.

    `magnitude` m is (out,); the norm is taken over the inputs of each output, of the base W alone
    with this one adapter added.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b, self.magnitude)


@dataclass(frozen=True)
class Scaled:
    """`scale * vector`, added to a bias: what `lora_bias` trains."""

    vector: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector,)


@dataclass(frozen=True)
class Experts:
    """`scale * b_e @ a_e` for each expert e of a parameter (experts, out, in), or of one (out, in).

    Trained by `target_parameters`. `a` is (experts * r, in) with the expert slowest, `b` is
    (out, r * experts) with the expert fastest, PEFT's ParamWrapper layout. `turned`: the parameter
    is (experts, in, out), and the transpose is added.
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: int
    turned: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Tuned:
    """The change by another PEFT tuner, computed by the tuner's own layer.

    `kind` is the adapter's `peft_type`; `tensors` are those of this module. The layer reads all
    parameters of its module, which are read from `base`.
    """

    folder: Path  # of the adapter, whose config and tensors PEFT loads
    kind: str
    path: str  # of the module
    parameter: str
    base: Base = field(repr=False, compare=False)
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Part:
    """One adapter's share in a `Composed` term: its own terms at the parameter, and its weight."""

    adapter: str
    terms: tuple[LowRank | Dora | Scaled | Experts | Tuned, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Composed:
    """One delta computed from the deltas of several adapters, each as if it were alone active.

    `method` is a row of `plan/methods.py`, which explains the options; `name` is that of the
    parameter and seeds random masks. Evaluated by `merge/composed.py`.
    """

    method: str
    name: str
    parts: tuple[Part, ...]
    density: float | None = None
    rank: int | None = None
    election: str = "total"
    seed: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for term in part.terms for t in term.tensors)


Leaf = LowRank | Dora | Scaled | Experts | Tuned
Term = Leaf | Composed


def leaves(terms: Iterable[Term]) -> Iterator[Leaf]:
    """The terms with tensors; a composition is replaced by the terms of its parts."""
    for term in terms:
        if isinstance(term, Composed):
            for part in term.parts:
                yield from part.terms
        else:
            yield term
