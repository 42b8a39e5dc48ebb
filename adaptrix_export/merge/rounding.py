"""float64 to the dtypes of weights, to nearest even, in one rounding.

bfloat16 is reached through float32, and two roundings are not one. The second is wrong only where
the first landed exactly half way between two bfloat16 values, which the low bits show: those few
are moved to the neighbour with an odd last bit, which remembers the side that the exact value was
on (https://hal.science/inria-00080427).
"""

from __future__ import annotations

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.plan import Array

_HALF_WAY = np.uint32(0x7FFF)  # bits of a float32 that are zero half way between two bfloat16


def to_dtype(exact: Array, dtype: str) -> Array:
    """float64 values in a safetensors dtype."""
    if dtype == "BF16":
        return _float32_between(exact).astype(DTYPES["BF16"])
    return exact.astype(DTYPES[dtype])


def _float32_between(exact: Array) -> Array:
    """float32 values that round to bfloat16 as `exact` does."""
    near: Array = exact.astype(np.float32, order="C")
    bits = near.reshape(-1).view(np.uint32)
    suspects = np.flatnonzero((bits & _HALF_WAY) == 0)
    if len(suspects):
        wanted = exact.reshape(-1)[suspects]
        found = near.reshape(-1)[suspects].astype(np.float64)
        moved = (found != wanted) & np.isfinite(found)
        # Their last bit is even: towards the exact value is away from zero if they are too small.
        steps = np.where(np.abs(found) > np.abs(wanted), np.int32(-1), np.int32(1))
        bits.view(np.int32)[suspects[moved]] += steps[moved]
    return near
