"""A matrix in blocks of columns: codes of 4 or 8 bits, a scale and a zero point for each block.

A weight (n, k) of a linear layer has n outputs and k inputs, and its blocks run along the inputs:

    value[i, j] = (code[i, j] - zero[i, j // block]) * scale[i, j // block]

Scales are rounded to fp16 before codes are chosen, so that what is stored is what was chosen for. A
difference of codes has at most 8 bits and a scale 11, so the product is exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Float = NDArray[np.float32]

TINY = float(np.finfo(np.float16).tiny)  # the least normal scale: subnormal ones lose bits
LARGEST = float(np.finfo(np.float16).max)
# Factors of the scale that spans a block's values: what a smaller one cuts off is often less than
# what its finer steps save.
GRID = tuple(np.linspace(0.64, 1.0, 10).tolist())


@dataclass(frozen=True)
class Spec:
    """How a matrix is stored. `symmetric`: the zero point is the middle code everywhere; `shifted`:
    a float is added to all values of a block."""

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    shifted: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, fp16 scales, zero points and float32 shifts."""
        blocks = self.blocks(columns)
        zeros = 0 if self.symmetric else rows * -(-blocks * self.bits // 8)
        return rows * blocks * (self.block * self.bits // 8 + (6 if self.shifted else 2)) + zeros


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: `codes` (n, k), `scales` fp16, `zeros` and `shifts` float32 (n, blocks);
    `zeros` is None where `spec` is symmetric, `shifts` where it is not shifted."""

    spec: Spec
    codes: Codes
    scales: NDArray[np.float16]
    zeros: Codes | None = None
    shifts: Float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantized(self) -> Float:
        """The values: exact in float32, but for the sum with a shift."""
        columns = self.codes.shape[1]
        signed = self.codes.astype(np.float32)
        if self.zeros is None:
            signed -= self.spec.middle
        else:
            signed -= _spread(self.zeros, self.spec.block, columns)
        signed *= _spread(self.scales.astype(np.float32), self.spec.block, columns)
        if self.shifts is not None:
            signed += _spread(self.shifts, self.spec.block, columns)
        return signed

    def digest(self) -> str:
        """sha256 of codes, scales and zero points, however they are packed."""
        digest = sha256(f"{self.spec.bits} {self.spec.block} {self.shape}".encode())
        for part in (self.codes, self.scales, self.zeros, self.shifts):
            digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def stacked(parts: list[Blocks]) -> Blocks:
    """Matrices of one width and one spec on top of each other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    shifts = [part.shifts for part in parts if part.shifts is not None]
    return Blocks(
        parts[0].spec,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
        np.concatenate(shifts) if shifts else None,
    )


def _spread(values: NDArray[Any], block: int, columns: int) -> NDArray[Any]:
    """A number a block as a number a column."""
    return np.repeat(values, block, axis=1)[:, :columns]


def in_blocks(matrix: NDArray[Any], block: int, fill: float = 0) -> NDArray[Any]:
    """(n, k) as (n, blocks, block), the last block filled up."""
    rows, columns = matrix.shape
    missing = -columns % block
    if missing:
        matrix = np.pad(matrix, ((0, 0), (0, missing)), constant_values=fill)
    return matrix.reshape(rows, -1, block)


def fp16_scales(scales: NDArray[Any]) -> NDArray[np.float16]:
    """Scales as they are stored: never zero, never subnormal, never infinite; signs are kept."""
    size = np.clip(np.abs(scales), TINY, LARGEST)
    stored: NDArray[np.float16] = np.copysign(size, scales).astype(np.float16)
    return stored


def nearest(matrix: Float, spec: Spec, weight: Float | None = None) -> Blocks:
    """Round to nearest (RTN), the scale of each block searched on a grid for the least squared
    error; `weight` (k,) says how much an error in each column counts."""
    values = in_blocks(matrix, spec.block)
    weights = None if weight is None else in_blocks(weight[None].astype(np.float32), spec.block)
    rows = max(1, (1 << 20) // max(1, matrix.shape[1]))
    parts = [
        _nearest_rows(values[start : start + rows], spec, weights, matrix.shape[1])
        for start in range(0, len(values), rows)
    ]
    return stacked(parts)


def _nearest_rows(
    values: NDArray[np.float32], spec: Spec, weights: Float | None, columns: int
) -> Blocks:
    best: tuple[Any, Any, Any] | None = None
    least: Any = None
    for scales, zeros in candidates(values, spec):
        step = scales.astype(np.float32)[..., None]
        shift = zeros.astype(np.float32)[..., None]
        codes = np.clip(np.rint(values / step) + shift, 0, spec.top)
        error = (codes - shift) * step - values
        error *= error
        if weights is not None:
            error *= weights
        total = error.sum(axis=-1)
        if best is None:
            best, least = (codes.astype(np.uint8), scales, zeros), total
            continue
        better = total < least
        least = np.where(better, total, least)
        best = (
            np.where(better[..., None], codes.astype(np.uint8), best[0]),
            np.where(better, scales, best[1]),
            np.where(better, zeros, best[2]),
        )
    assert best is not None
    codes = best[0].reshape(len(values), -1)[:, :columns]
    return Blocks(spec, codes, best[1], None if spec.symmetric else best[2])


def candidates(
    values: NDArray[np.float32], spec: Spec
) -> list[tuple[NDArray[np.float16], NDArray[np.uint8]]]:
    """Scales and zero points to try for blocks (n, blocks, block).

    Symmetric codes reach one step further down than up, so the scale takes the sign that gives the
    longer arm to the value that is largest in size; a scale may be negative.
    """
    tried = []
    if spec.symmetric:
        low, high = values.min(axis=-1), values.max(axis=-1)
        largest = np.where(-low > high, low, high)
        zeros = np.full(largest.shape, spec.middle, np.uint8)
        grid = GRID if spec.bits < 8 else (0.98, 1.0)
        for factor in grid:
            tried.append((fp16_scales(largest * factor / -spec.middle), zeros))
        tried.append((fp16_scales(largest / (spec.middle - 1)), zeros))
        return tried
    low = np.minimum(values.min(axis=-1), 0)
    high = np.maximum(values.max(axis=-1), 0)
    grid = GRID if spec.bits < 8 else (1.0,)
    for factor in grid:
        scales = fp16_scales((high - low) * factor / spec.top)
        exact = -low * factor / scales.astype(np.float32)
        for zero in {np.rint, np.floor} if spec.bits < 8 else {np.rint}:
            tried.append((scales, np.clip(zero(exact), 0, spec.top).astype(np.uint8)))
    return tried
