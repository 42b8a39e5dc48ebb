"""Detects merged values that overflow float16, whose largest value is 65504."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from adaptrix_export.errors import AdapterError
from adaptrix_export.plan import Array, Change

LARGEST = 65504.0
_INFINITY = 0x7C00  # the bits of a float16 infinity without its sign


def within_float16(change: Change, blocks: Iterable[Array]) -> Iterator[Array]:
    """The blocks, or AdapterError at the first value that became infinite in rounding.

    A base or adapter with infinities of its own was refused before (`load/files/finite.py`).
    """
    for block in blocks:
        if np.any((block.view(np.uint16) & 0x7FFF) == _INFINITY):
            raise AdapterError(
                change.name, "a merged value beyond float16's largest",
                f"at most {LARGEST:g}, in a base stored in float16",
                "check alpha; or save the base in bfloat16 or float32 and build on that",
            )  # fmt: skip
        yield block
