"""Quantized matrices as the bytes that ONNX Runtime's operators take, and back.

MatMulNBits: codes (n, blocks, block * bits / 8), zero points (n, bytes of a row). Of two codes of 4
bits in a byte the first is the low one. Beyond the last column a block is filled up with the zero
point, which stands for 0. GatherBlockQuantized: codes (n, k * bits / 8), the same bytes where
blocks divide the columns.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.precision.blocks import Blocks, Codes, Spec, in_blocks


def packed_codes(blocks: Blocks) -> Codes:
    """(n, blocks, block * bits / 8), for MatMulNBits."""
    spec, columns = blocks.spec, blocks.shape[1]
    codes = in_blocks(blocks.codes, spec.block, fill=spec.middle)
    if blocks.zeros is not None and columns % spec.block:
        codes[:, -1, columns % spec.block :] = blocks.zeros[:, -1:]
    return _paired(codes) if spec.bits == 4 else codes


def packed_rows(blocks: Blocks) -> Codes:
    """(n, k * bits / 8), for GatherBlockQuantized."""
    return _paired(blocks.codes) if blocks.spec.bits == 4 else blocks.codes


def packed_zeros(blocks: Blocks) -> Codes | None:
    """(n, bytes), an odd last one filled up with the middle code."""
    if blocks.zeros is None or blocks.spec.bits == 8:
        return blocks.zeros
    zeros = blocks.zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)), constant_values=blocks.spec.middle)
    return _paired(zeros)


def unpacked(
    spec: Spec, columns: int, codes: Codes, scales: NDArray[Any], zeros: Codes | None
) -> Blocks:
    """The inverse of `packed_codes` and `packed_zeros`."""
    count = spec.blocks(columns)
    whole = _halves(codes) if spec.bits == 4 else codes
    plain = whole.reshape(len(codes), -1)[:, :columns]
    points = None
    if zeros is not None:
        points = (_halves(zeros) if spec.bits == 4 else zeros)[:, :count]
    return Blocks(spec, plain, scales, points)


def _paired(codes: Codes) -> Codes:
    high = np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return np.bitwise_or(codes[..., 0::2], high, dtype=np.uint8)


def _halves(packed: Codes) -> Codes:
    both = np.stack([packed % 16, packed // 16], axis=-1).astype(np.uint8)
    return both.reshape(*packed.shape[:-1], -1)
