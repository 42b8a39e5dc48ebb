"""Views of stored tensors: transposed, flattened, sliced, or padded with zero rows.

Each is a `plan.Tensor` over another one. Values are read only while lowering, and are not changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES, StoredTensor
from adaptrix_export.plan import Array, Tensor


@dataclass(frozen=True)
class _View:
    source: Tensor

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> str:
        return self.source.dtype


@dataclass(frozen=True)
class Transposed(_View):
    """A matrix (n, m) as (m, n).

    `by_format`: a factor whose format stores it so; its values are contiguous. Otherwise its shape
    gave it away, which is recorded as an adjustment. `is_kept`: a large matrix that is read by
    rows; the last one read stays in memory, since a row of its transpose needs all of it.
    """

    by_format: bool = False
    is_kept: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[::-1]

    def read(self) -> Array:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Array:
        source: Any = self.source
        whole = _last_read(source) if self.is_kept else source.read()
        rows = whole[:, start:stop].T
        return np.ascontiguousarray(rows) if self.by_format else rows


@lru_cache(maxsize=1)
def _last_read(tensor: Any) -> Array:
    values: Array = tensor.read()
    return values


@dataclass(frozen=True)
class Flattened(_View):
    """A convolution's factor (n, m, k, ...) as a matrix (n, m * k * ...)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0], prod(self.source.shape[1:]))

    def read(self) -> Array:
        return self.source.read().reshape(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        return self.source.rows(start, stop).reshape(stop - start, -1)


@dataclass(frozen=True)
class Cut(_View):
    """Rows `start` to `stop` - 1 of the first axis."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.source.shape[1:])

    def read(self) -> Array:
        return self.source.rows(self.start, self.stop)

    def rows(self, start: int, stop: int) -> Array:
        return self.source.rows(self.start + start, self.start + stop)


@dataclass(frozen=True)
class Placed(_View):
    """The source as the rows from `start` on of a tensor of `count` rows, the others zero: a factor
    that acts on some outputs only. Never used on a weight."""

    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.source.shape[1:])

    def read(self) -> Array:
        return self.rows(0, self.count)

    def rows(self, start: int, stop: int) -> Array:
        dtype: np.dtype[Any] = DTYPES[self.dtype]
        values = np.zeros((stop - start, *self.shape[1:]), dtype)
        first = max(start, self.start)
        last = min(stop, self.start + self.source.shape[0])
        if first < last:
            values[first - start : last - start] = self.source.rows(
                first - self.start, last - self.start
            )
        return values


FileTensor = StoredTensor | Transposed  # what a file of an adapter has


def renamed(tensor: FileTensor, name: str) -> FileTensor:
    """The same tensor under another name."""
    if isinstance(tensor, StoredTensor):
        return replace(tensor, name=name)
    assert isinstance(tensor.source, StoredTensor)
    return replace(tensor, source=replace(tensor.source, name=name))


def orient_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA factors in PEFT's layout, (r, in) and (out, r), from factors that may be transposed.

    They are transposed only if both have the rank on the other axis and not on PEFT's, so that
    there is only one way to read them. All others are returned unchanged, for the caller's checks.
    """
    natural = a.shape[0] == rank and b.shape[1] == rank
    turned = a.shape[1] == rank and b.shape[0] == rank
    if turned and not natural and a.shape[0] != rank and b.shape[1] != rank:
        return Transposed(a), Transposed(b)
    return a, b
