"""float64 to the dtypes of weights, to nearest even, in one rounding.

ml_dtypes converts to bfloat16 through float32, which rounds twice. The second rounding is wrong
only if the first result is exactly half way between two bfloat16 values, which its low bits show.
Such values are moved to the neighbouring float32 on the side of the exact value
(https://hal.science/inria-00080427).
"""

from __future__ import annotations

import numpy as np

from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.plan import Array

_HALF_WAY = np.uint32(0x7FFF)  # bits of a float32 that are zero half way between two bfloat16


def to_dtype(exact: Array, dtype: str) -> Array:
    """float64 values in a safetensors dtype."""
    if dtype == "BF16":
        return _float32_before_bfloat16(exact).astype(DTYPES["BF16"])
    return exact.astype(DTYPES[dtype])


def _float32_before_bfloat16(exact: Array) -> Array:
    """float32 values that round to bfloat16 as `exact` does."""
    near: Array = exact.astype(np.float32, order="C")
    bits = near.reshape(-1).view(np.uint32)
    suspects = np.flatnonzero((bits & _HALF_WAY) == 0)
    if len(suspects):
        exact_values = exact.reshape(-1)[suspects]
        rounded = near.reshape(-1)[suspects].astype(np.float64)
        moved = (rounded != exact_values) & np.isfinite(rounded)
        # One step towards the exact value: away from zero if the rounded one is too small.
        steps = np.where(np.abs(rounded) > np.abs(exact_values), np.int32(-1), np.int32(1))
        bits.view(np.int32)[suspects[moved]] += steps[moved]
    return near
