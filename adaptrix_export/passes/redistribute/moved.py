"""What a strategy works on and gives back: low-rank terms by place, and algebra on their factors.

Arithmetic is fp64; results are rounded once, to the dtype that the adapter has.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.plan import Array, LowRank

Matrix = NDArray[np.float64]
Factors = tuple[Matrix, Matrix]  # a (r, in) and b (out, r), the scale folded into b
Place = tuple[int, str]  # layer, module path inside the layer
Terms = dict[Place, tuple[LowRank, ...]]


@dataclass(frozen=True)
class Moved:
    """Terms on the target layers, and what is to be told of how they came about.

    `measured` is what the strategy saw, for the report; `notes` are for people.
    """

    terms: Terms
    measured: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryTensor:
    """A `plan.Tensor` that is in memory: a factor that a pass has just computed."""

    name: str
    values: Array = field(repr=False, compare=False)

    @property
    def dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def read(self) -> Array:
        return self.values

    def rows(self, start: int, stop: int) -> Array:
        return self.values[start:stop]


def factors(terms: Sequence[LowRank]) -> Factors:
    """A sum of terms as one pair: their factors side by side."""
    a = np.concatenate([t.a.read().astype(np.float64) for t in terms], axis=0)
    b = np.concatenate([t.scale * t.b.read().astype(np.float64) for t in terms], axis=1)
    return a, b


def beside(pairs: Iterable[Factors]) -> Factors:
    """The sum of several pairs, exactly, with the sum of their ranks."""
    all_a, all_b = zip(*pairs, strict=True)
    return np.concatenate(all_a), np.concatenate(all_b, axis=1)


def truncated(pair: Factors, rank: int) -> Factors:
    """The best approximation of b a of that rank (Eckart-Young), from the factors alone.

    The roots of the singular values go to either side, as PEFT's SVD does.
    """
    a, b = pair
    if len(a) <= rank:
        return pair
    qa, ra = np.linalg.qr(a.T)
    qb, rb = np.linalg.qr(b)
    u, s, vt = np.linalg.svd(rb @ ra.T)
    root = np.sqrt(s[:rank])
    return root[:, None] * (vt[:rank] @ qa.T), (qb @ u[:, :rank]) * root


def common_dtype(terms: Mapping[Place, tuple[LowRank, ...]]) -> str:
    """The dtype of every factor where they agree on one of 16 bits, else F32."""
    dtypes = {x.dtype for site_terms in terms.values() for t in site_terms for x in t.tensors}
    return dtypes.pop() if dtypes in ({"F16"}, {"BF16"}) else "F32"


def as_term(place: Place, pair: Factors, dtype: str = "F32") -> LowRank:
    """A pair as a term of the plan, scale 1, rounded to `dtype`.

    Row i of a and column i of b are first made equally large, so that neither is lost in the
    range of a 16-bit format.
    """
    sizes = np.linalg.norm(pair[0], axis=1), np.linalg.norm(pair[1], axis=0)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    root = np.sqrt(np.divide(sizes[1], sizes[0], out=np.ones_like(sizes[0]), where=both))
    root = np.where(both, root, 1.0)
    a = to_dtype(np.ascontiguousarray(pair[0] * root[:, None], np.float64), dtype)
    b = to_dtype(np.ascontiguousarray(pair[1] / root, np.float64), dtype)
    layer, module = place
    return LowRank(
        MemoryTensor(f"{layer}.{module}.a", a), MemoryTensor(f"{layer}.{module}.b", b), 1.0
    )


def by_layer(terms: Mapping[Place, tuple[LowRank, ...]]) -> dict[int, Terms]:
    """The same terms, layer by layer."""
    layers: dict[int, Terms] = {}
    for (layer, module), site_terms in sorted(terms.items()):
        layers.setdefault(layer, {})[layer, module] = site_terms
    return layers
