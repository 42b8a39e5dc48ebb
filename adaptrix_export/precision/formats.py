"""The number formats that an artifact's weights can have: one row each.

A row says how weights are stored, which operators of ONNX Runtime read them, on which execution
providers they are fast, and how far a proved artifact may be from what it says it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AUTO = "auto"


@dataclass(frozen=True)
class Format:
    """One precision.

    `bits`: of a code of a quantized matrix, None where weights stay floats. `element`: the float
    type, by its name in ONNX, of the weights that are not quantized. `operators`: what reads
    quantized weights. `refused`: execution provider -> why it does not run this.
    """

    name: str
    bits: int | None
    element: str
    operators: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return self.bits is not None


_NBITS = ("com.microsoft::MatMulNBits", "com.microsoft::GatherBlockQuantized")

PRECISIONS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format("fp32", None, "FLOAT"),
        Format("int8", 8, "FLOAT", _NBITS),
        Format("int4", 4, "FLOAT", _NBITS),
    )
}

# How MatMulNBits multiplies: 4 rounds the activations to int8, block by block, which is the only
# way that is fast on a CPU (8 bits at level 0 take 20 times as long as float weights); 0 leaves
# them float.
ACCURACY_FAST, ACCURACY_FLOAT = 4, 0
# What MatMulNBits on a CPU has fast kernels for.
BLOCKS = (16, 32, 64, 128, 256)
