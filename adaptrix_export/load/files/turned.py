"""A matrix that a file stores transposed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptrix_export.plan import Array, Tensor


@dataclass(frozen=True)
class Turned:
    """`stored`, transposed. An adapter's factors are small: they are read whole."""

    name: str
    stored: Tensor

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    def read(self) -> Array:
        return np.ascontiguousarray(self.stored.read().T)

    def rows(self, start: int, stop: int) -> Array:
        return self.read()[start:stop]
