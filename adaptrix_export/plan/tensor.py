"""A tensor on disk, by reference."""

from __future__ import annotations

from typing import Any, Protocol

from numpy import dtype, ndarray

Array = ndarray[Any, dtype[Any]]


class Tensor(Protocol):
    """A tensor on disk: its header is known, its values are read on demand.

    `dtype` is a safetensors name (`F32`, `F16`, `BF16`, ...). `rows(i, j)` decodes rows i to j-1
    of the first axis only, so that a large matrix need not be in memory at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Array: ...
    def rows(self, start: int, stop: int) -> Array: ...
