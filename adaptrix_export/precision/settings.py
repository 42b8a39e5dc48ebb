"""How an artifact's weights are to be quantized: what a recipe's `quantize` means."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from adaptrix_export.precision.blocks import Spec

if TYPE_CHECKING:
    from adaptrix_export.measure.calibration import Calibration

GPTQ, RTN, LOSSLESS = "gptq", "rtn", "lossless"
LEAST_BLOCK = 16
MAX_KL = 0.15  # nats a token to the float model, above which nothing is published
MIN_COSINE = 0.98  # of an encoder's answers with the float model's, likewise


@dataclass(frozen=True)
class Quantization:
    """The options of a quantized artifact.

    `method`: gptq, with calibration text, rtn, without, or lossless, the base's own codes.
    `overrides`: pattern of a module's path -> bits; the first that matches counts. `embedding`:
    bits of the embedding and the head, None for float. `keep`: patterns of modules that stay float.
    """

    precision: str
    bits: int
    method: str = RTN
    block: int = 32
    symmetric: bool = True
    embedding: int | None = 8
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()
    fp16_scales: bool = True
    calibration: Calibration | None = None
    max_kl: float | None = MAX_KL
    min_cosine: float | None = MIN_COSINE

    def keeps_float(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.keep)

    def bits_of(self, module: str) -> int:
        """Bits of the weight of a linear layer."""
        matches = (bits for pattern, bits in self.overrides if fnmatchcase(module, pattern))
        return next(matches, self.bits)

    def spec(self, bits: int, columns: int, *, whole: bool = False) -> Spec | None:
        """How a matrix with so many columns is stored; None if no block fits.

        `whole`: blocks must divide the columns. Symmetric codes of 8 bits lose nothing.
        """
        block = self.block
        while block > LEAST_BLOCK and (columns < block or (whole and columns % block)):
            block //= 2
        if columns < block or (whole and columns % block):
            return None
        return Spec(bits, block, self.symmetric or bits == 8 or whole)


@dataclass(frozen=True)
class Storage:
    """How a graph's weights are stored: matrices as floats of `precision`, or as `quantization`
    says."""

    precision: str = "fp32"
    quantization: Quantization | None = None

    @property
    def width(self) -> int:
        """Bytes of a value of a matrix that is not quantized."""
        return 2 if self.precision in ("fp16", "bf16") else 4


FLOAT32 = Storage()
