"""Weights of `quant_method: awq`, as AutoAWQ stores them for its GEMM kernel.

A Linear (out, in) is `X.qweight` (in, out packed), `X.qzeros` (groups, out packed) and `X.scales`
(groups, out); eight numbers of four bits share a word, lowest bits first, in the order of `ORDER`:

    W[o, i] = scales[g, o] * (qweight[i, o] - qzeros[g, o]),  g = i // group_size

in the dtype of the scales. Packing: https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, StoredTensor
from adaptrix_export.load.quantized.bits import Whole, unpack_words
from adaptrix_export.load.quantized.parts import check_part, gathered
from adaptrix_export.plan import Array, Tensor

BITS, IN_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that each four bits hold
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class AwqTensor(Whole):
    name: str
    dtype: str
    shape: tuple[int, int]
    numbers: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor

    @property
    def form(self) -> str:
        return f"4 bits in groups of {self.shape[1] // self.scales.shape[0]}"

    def decode(self) -> Array:
        size = self.shape[1] // self.scales.shape[0]
        numbers, zeros = (_ordered(t.read()).astype(np.float32) for t in (self.numbers, self.zeros))
        scales = self.scales.read().astype(np.float32)
        steps = numbers - np.repeat(zeros, size, axis=0)
        scaled: Array = steps * np.repeat(scales, size, axis=0)
        return scaled.astype(DTYPES[self.dtype]).T


def _ordered(words: Array) -> Array:
    """(rows, columns) of words (rows, columns / 8)."""
    packed = unpack_words(words, BITS, words.shape[1] * IN_WORD, axis=1)
    return packed.reshape(len(words), -1, IN_WORD)[..., np.argsort(ORDER)].reshape(len(words), -1)


def read_awq(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, each quantized weight with its parts as one tensor.

    Raises SourceError for parts that do not fit each other, UnsupportedError for another kernel's
    layout.
    """
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise UnsupportedError(
            f"{place}: quantization_config", f"{bits} bits, version {version!r}",
            "4 bits, version gemm", "save it again for gemm, or name the unquantized model",
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for module in gathered(place, stored, PARTS, tensors):
        numbers, zeros, scales = module.parts
        columns, rows = numbers.shape[0], scales.shape[-1]
        groups = scales.shape[0] if scales.shape[0] and not columns % scales.shape[0] else 1
        check_part(place, numbers, ("I32",), (columns, rows // IN_WORD))
        check_part(place, scales, FLOATS, (groups, rows))
        check_part(place, zeros, ("I32",), (groups, rows // IN_WORD))
        tensors[f"{module.name}.weight"] = AwqTensor(
            module.stored("weight"), scales.dtype, (rows, columns), numbers, zeros, scales
        )
    return tensors
