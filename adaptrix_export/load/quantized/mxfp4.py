"""Experts of `quant_method: mxfp4` (gpt-oss): 32 numbers of four bits share a power of two.

`X_blocks` uint8 (experts, out, in / 32, 16), the lower half of a byte first, and `X_scales` uint8
(experts, out, in / 32), the exponent plus 127. The live parameter is `X` (experts, in, out).
Numbers: OCP Microscaling Formats (MX) 1.0, E2M1 with E8M0 scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, ByRows, StoredTensor
from adaptrix_export.load.quantized.parts import DAMAGED, check_part
from adaptrix_export.plan import Array, Tensor

BLOCKS, SCALES = "_blocks", "_scales"
IN_BYTE, BIAS = 2, 127
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True)
class Mxfp4Tensor(ByRows):
    """A row is an expert."""

    name: str
    dtype: str
    shape: tuple[int, int, int]
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def form(self) -> str:
        return "E2M1 in blocks of 32"

    def rows(self, start: int, stop: int) -> Array:
        packed = self.blocks.rows(start, stop)
        numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
        signed = np.concatenate([LEVELS, -LEVELS])[numbers]
        exponents = self.scales.rows(start, stop).astype(np.int32) - BIAS
        values = np.ldexp(signed, exponents[..., None]).reshape(*packed.shape[:2], -1)
        turned: Array = values.astype(DTYPES[self.dtype]).transpose(0, 2, 1)
        return turned


def read_mxfp4(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, the experts reading as `dtype`.

    Raises SourceError for blocks without their scales, and for what is no float beside them.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        live = name.removesuffix(BLOCKS)
        if live != name:
            scales = stored.get(live + SCALES)
            if scales is None or len(tensor.shape) != 4:
                raise SourceError(
                    f"{place}: {name}", f"shape {list(tensor.shape)}"
                    + ("" if scales else f", and no {live}{SCALES}"),
                    "(experts, out, blocks, 16) and the scales", DAMAGED,
                )  # fmt: skip
            experts, rows, blocks, size = tensor.shape
            check_part(place, tensor, ("U8",), (experts, rows, blocks, 16))
            check_part(place, scales, ("U8",), (experts, rows, blocks))
            columns = blocks * size * IN_BYTE
            tensors[live] = Mxfp4Tensor(
                tensor.name.removesuffix(BLOCKS), dtype, (experts, columns, rows), tensor, scales
            )
        elif tensor.dtype in FLOATS:
            tensors[name] = tensor
        elif name.removesuffix(SCALES) + BLOCKS not in stored:
            raise SourceError(
                f"{place}: {name}", f"{tensor.dtype}, and no part of an expert",
                "floats, blocks and scales", DAMAGED,
            )  # fmt: skip
    return tensors
