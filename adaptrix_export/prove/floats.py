"""Half a unit in the last place, exactly, for the float formats that an artifact may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
_EXPONENT = np.uint64(0x7FF0_0000_0000_0000)


@dataclass(frozen=True)
class FloatFormat:
    """An IEEE-like binary format: significand bits (hidden one counted) and smallest exponent."""

    name: str
    dtype: np.dtype[Any]
    bits: int
    min_exponent: int

    def half_ulp(self, at: Float64) -> Float64:
        """Half the spacing of this format's numbers around each value of `at`, same shape.

        The binade is read off the fp64 exponent field, so the result is exact, powers of two
        included; below the smallest normal number the spacing stays that of the subnormals.
        """
        binade = (at.view(np.uint64) & _EXPONENT).view(np.float64)
        np.maximum(binade, 2.0**self.min_exponent, out=binade)
        binade *= 2.0**-self.bits
        return binade


FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("fp32", np.dtype(np.float32), 24, -126),
        FloatFormat("fp16", np.dtype(np.float16), 11, -14),
        FloatFormat("bf16", np.dtype(ml_dtypes.bfloat16), 8, -126),
    )
}


def format_of(dtype: np.dtype[Any]) -> FloatFormat | None:
    """The format of a numpy dtype, or None for one that cannot be replayed (integers, fp8, ...)."""
    return next((f for f in FORMATS.values() if f.dtype == dtype.newbyteorder("=")), None)
