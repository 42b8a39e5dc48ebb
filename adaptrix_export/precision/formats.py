"""The number formats that an artifact's weights can have: one row each.

How far a proved artifact of each may be from its oracle is a row of `oracle/job.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NBITS = ("com.microsoft::MatMulNBits", "com.microsoft::GatherBlockQuantized")


@dataclass(frozen=True)
class Format:
    """One precision. `bits`: of a code of a quantized matrix, None where weights stay floats;
    `operators`: what reads such matrices, in place of MatMul, Gemm and Gather."""

    name: str
    bits: int | None
    operators: tuple[str, ...] = ()


PRECISIONS: Mapping[str, Format] = {
    row.name: row
    for row in (Format("fp32", None), Format("int8", 8, NBITS), Format("int4", 4, NBITS))
}

# How MatMulNBits multiplies: 4 rounds the activations to int8, block by block, which is the only
# way that is fast on a CPU (8 bits at level 0 take 20 times as long as float weights); 0 leaves
# them float.
ACCURACY_FAST = 4
