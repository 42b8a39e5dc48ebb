"""The codes of a GGUF tensor, as they are stored: Q4_0, Q4_1 and Q8_0, in blocks of 32 inputs.

    Q4_0  (code - 8) * d            Q4_1  code * d + m            Q8_0  (code - 128) * d

https://github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c. In a block of 4 bits the low halves
of the 16 bytes are the first 16 codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
HALF = BLOCK // 2


@dataclass(frozen=True)
class GgufFormat:
    """`bits` of a code; `has_minimum`: a block has a float that is added to each value."""

    name: str
    bits: int
    has_minimum: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return BLOCK * self.bits // 8 + (4 if self.has_minimum else 2)


# By the number of ggml's type.
FORMATS = {2: GgufFormat("Q4_0", 4), 3: GgufFormat("Q4_1", 4, True), 8: GgufFormat("Q8_0", 8)}


@dataclass(frozen=True)
class StoredBlocks:
    """Codes (n, k) from 0 up, scales fp16 (n, blocks), minima fp16 (n, blocks) or None."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None


def blocks_of(raw: NDArray[np.uint8], kind: GgufFormat) -> StoredBlocks:
    """Rows of bytes (n, bytes of a row), taken apart."""
    rows = len(raw)
    blocks = raw.reshape(rows, -1, kind.nbytes)
    floats, start = _fp16(blocks[..., :2]), 2
    minima = None
    if kind.has_minimum:
        minima, start = _fp16(blocks[..., 2:4]), 4
    stored = blocks[..., start:]
    if kind.bits == 8:
        codes: NDArray[Any] = stored ^ np.uint8(128)  # int8 to a code: -128 is 0
    else:
        codes = np.concatenate([stored % 16, stored // 16], axis=-1)
    return StoredBlocks(np.ascontiguousarray(codes.reshape(rows, -1)), floats, minima)


def _fp16(raw: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view(np.dtype("<f2")).reshape(raw.shape[:-1])
