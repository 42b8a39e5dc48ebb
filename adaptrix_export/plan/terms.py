"""The kinds of terms that a delta is a sum of; evaluated by `merge`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from adaptrix_export.plan.base import Base
from adaptrix_export.plan.tensor import Tensor
from adaptrix_export.plan.term_kind import Size, TermKind


@dataclass(frozen=True)
class Factors(TermKind):
    """What LoRA and DoRA share: `a` is (r, in), `b` is (out, r), and `scale * b @ a` is added."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return self.scale

    @property
    def lora_rank(self) -> int:
        return self.rank

    @property
    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, self.scale

    @property
    def outputs(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True)
class LowRank(Factors):
    """The term `scale * b @ a`, shape (out, in), from a (r, in) and b (out, r)."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)

    @property
    def is_plain(self) -> bool:
        return True

    @property
    def vanishes_with(self) -> tuple[Tensor, ...]:
        return (self.b, self.a)

    def sizes(self, outputs: int, inputs: int) -> list[Size]:
        return _factor_sizes(self.a, self.b, outputs, inputs)

    def scaled_by(self, weight: float) -> LowRank:
        return replace(self, scale=weight * self.scale)

    def with_outputs(self, cut: Callable[[Tensor], Tensor]) -> LowRank:
        return replace(self, b=cut(self.b))

    def peft_tensors(self, embedding: bool) -> Mapping[str, Tensor]:
        return _peft_factors(self.a, self.b, embedding)


@dataclass(frozen=True)
class Dora(Factors):
    """DoRA, https://arxiv.org/abs/2402.09353: m / |W + scale b a| * (W + scale b a) - W.

    `magnitude` m is (out,); the norm is taken over the inputs of each output, of the base W alone
    with this one adapter added.
    """

    magnitude: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b, self.magnitude)

    @property
    def reads_base(self) -> bool:
        return True

    @property
    def lora_magnitude(self) -> Tensor:
        return self.magnitude

    def sizes(self, outputs: int, inputs: int) -> list[Size]:
        magnitude = ("a magnitude of {} values", prod(self.magnitude.shape), outputs)
        return [*_factor_sizes(self.a, self.b, outputs, inputs), magnitude]

    def with_outputs(self, cut: Callable[[Tensor], Tensor]) -> Dora:
        # its norm is taken output by output
        return replace(self, b=cut(self.b), magnitude=cut(self.magnitude))

    def peft_tensors(self, embedding: bool) -> Mapping[str, Tensor]:
        factors = _peft_factors(self.a, self.b, embedding)
        return {**factors, "lora_magnitude_vector": self.magnitude}


@dataclass(frozen=True)
class Scaled(TermKind):
    """`scale * vector`, added to a bias: what `lora_bias` trains."""

    vector: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector,)

    @property
    def scaling(self) -> float:
        return self.scale

    @property
    def vanishes_with(self) -> tuple[Tensor, ...]:
        return (self.vector,)

    @property
    def outputs(self) -> int:
        return self.vector.shape[0]

    def sizes(self, outputs: int, inputs: int) -> list[Size]:
        return [("lora_B.bias with {} values", self.vector.shape[0], outputs)]

    def scaled_by(self, weight: float) -> Scaled:
        return replace(self, scale=weight * self.scale)

    def with_outputs(self, cut: Callable[[Tensor], Tensor]) -> Scaled:
        return replace(self, vector=cut(self.vector))

    def peft_tensors(self, embedding: bool) -> Mapping[str, Tensor]:
        return {"lora_B.bias": self.vector}


@dataclass(frozen=True)
class Experts(TermKind):
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

    @property
    def is_stacked(self) -> bool:
        return True

    @property
    def scaling(self) -> float:
        return self.scale

    @property
    def lora_rank(self) -> int:
        return self.rank

    def sizes(self, outputs: int, inputs: int) -> list[Size]:
        return _factor_sizes(self.a, self.b, outputs, inputs)

    def scaled_by(self, weight: float) -> Experts:
        return replace(self, scale=weight * self.scale)


@dataclass(frozen=True)
class Tuned(TermKind):
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

    @property
    def is_layer_made(self) -> bool:
        return True

    @property
    def reads_base(self) -> bool:
        return True


@dataclass(frozen=True)
class Part:
    """One adapter's share in a `Composed` term: its own terms at the parameter, and its weight."""

    adapter: str
    terms: tuple[LowRank | Dora | Scaled | Experts | Tuned, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Composed(TermKind):
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


def _factor_sizes(a: Tensor, b: Tensor, outputs: int, inputs: int) -> list[Size]:
    return [
        ("lora_A with {} columns", a.shape[1], inputs),
        ("lora_B with {} rows", b.shape[0], outputs),
    ]


def _peft_factors(a: Tensor, b: Tensor, embedding: bool) -> dict[str, Tensor]:
    if embedding:
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b}


def low_ranks(terms: Iterable[Term]) -> list[LowRank]:
    """The terms that are LoRA and nothing else."""
    return [term for term in terms if isinstance(term, LowRank)]


def on_experts(terms: Iterable[Term]) -> list[Experts]:
    """The terms on parameters that stack experts."""
    return [term for term in terms if isinstance(term, Experts)]


def leaves(terms: Iterable[Term]) -> Iterator[Leaf]:
    """The terms with tensors; a composition is replaced by the terms of its parts."""
    for term in terms:
        if isinstance(term, Composed):
            for part in term.parts:
                yield from part.terms
        else:
            yield term
