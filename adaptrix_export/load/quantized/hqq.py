"""Weights of `quant_method: hqq`, as transformers saves HQQ's layers.

A Linear (out, in) is `X.W_q`, packed along its rows, first rows in the highest bits, with `X.scale`
and `X.zero`, and facts as tensors: `X.shape`, `X.nbits`, `X.group_size`, `X.axis`. The matrix is
taken as groups, a column each (axis 0) or a row each (axis 1):

    W = ((number - zero) * scale).reshape(shape)

each step rounded to the dtype that the model computes in. Format: https://github.com/mobiusml/hqq.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, StoredTensor
from adaptrix_export.load.quantized.bits import Whole
from adaptrix_export.load.quantized.parts import DAMAGED, check_part, gathered
from adaptrix_export.plan import Array, Tensor

PARTS = ("W_q", "scale", "zero", "shape", "nbits")
FACTS = (
    "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
# Bits of a number -> (numbers in a word, bits of a word)
PACKINGS = {8: (1, 8), 4: (2, 8), 3: (10, 30), 2: (4, 8), 1: (8, 8)}


@dataclass(frozen=True)
class HqqTensor(Whole):
    name: str
    dtype: str
    shape: tuple[int, int]
    bits: int
    numbers: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor

    @property
    def form(self) -> str:
        return f"{self.bits} bits"

    def decode(self) -> Array:
        dtype = DTYPES[self.dtype]
        scales, zeros = (part.read().astype(dtype) for part in (self.scales, self.zeros))
        numbers = self._numbers().astype(dtype)
        # Values of a half type are rounded after each step, as torch does it.
        scaled: Array = (numbers - zeros).astype(dtype) * scales
        return scaled.astype(dtype).reshape(self.shape)

    def _numbers(self) -> Array:
        """As groups: (group size, groups), or (groups, group size)."""
        count, width = PACKINGS[self.bits]
        words = self.numbers.read()
        words = words if words.dtype in (np.uint8, np.int32) else words.view(np.uint8)
        shifts = range(width - self.bits, -1, -self.bits)
        mask = words.dtype.type(2**self.bits - 1)
        numbers = np.concatenate([(words >> words.dtype.type(s)) & mask for s in shifts])
        assert len(shifts) == count
        return numbers[: prod(self.shape) // numbers.shape[1]]


def read_hqq(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, each quantized weight with its parts as one tensor.

    Raises SourceError for parts that do not fit each other, UnsupportedError for scales or zero
    points that are quantized themselves.
    """
    tensors: dict[str, Tensor] = {}
    for module in gathered(place, stored, PARTS, tensors, FACTS):
        numbers, scales, zeros, shape, bits = module.parts
        for fact in ("quant_scale", "quant_zero"):
            tensor = stored.get(f"{module.name}.{fact}")
            if tensor is not None and tensor.read().any():
                raise UnsupportedError(
                    f"{place}: {module.name}.{fact}", "quantized scales or zero points",
                    "plain ones", "name the unquantized model as the base",
                )  # fmt: skip
        sizes = tuple(int(n) for n in shape.read().reshape(-1))
        width = int(bits.read().reshape(-1)[0]) if prod(bits.shape) == 1 else 0
        if len(sizes) != 2 or width not in PACKINGS or not _fits(numbers, scales, sizes, width):
            raise SourceError(
                f"{place}: {module.name}.W_q",
                f"{numbers.dtype} of shape {list(numbers.shape)}, {width} bits, scales of shape "
                f"{list(scales.shape)}", f"the numbers of a matrix {list(sizes)}", DAMAGED,
            )  # fmt: skip
        check_part(place, zeros, FLOATS, scales.shape)
        tensors[f"{module.name}.weight"] = HqqTensor(
            module.stored("weight"), dtype, (sizes[0], sizes[1]), width, numbers, scales, zeros
        )
    return tensors


def _fits(numbers: StoredTensor, scales: StoredTensor, sizes: tuple[int, ...], bits: int) -> bool:
    """Whether there are as many numbers as the matrix has, and a scale for each group."""
    count, width = PACKINGS[bits]
    if len(numbers.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in FLOATS:
        return False
    inner = 1 if numbers.dtype in ("U8", "I32") else DTYPES[numbers.dtype].itemsize
    rows, columns = numbers.shape[0] * count, numbers.shape[1] * inner
    if (width > 8) != (numbers.dtype == "I32") or not columns or prod(sizes) % columns:
        return False
    needed = prod(sizes) // columns
    grouped = scales.shape in ((1, columns), (needed, 1), (1, 1))
    return grouped and needed <= rows < needed + count
