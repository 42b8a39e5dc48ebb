"""Weights of `quant_method: gptq`, as AutoGPTQ and GPTQModel store them.

A Linear (out, in) is `X.qweight` (in packed, out), `X.qzeros` (groups, out packed), `X.scales`
(groups, out) and `X.g_idx` (in), the group of each input:

    W[o, i] = scales[g, o] * (qweight[i, o] - zero[g, o]),  g = g_idx[i]

in the dtype of the scales. `checkpoint_format: gptq` stores a zero point less one, `gptq_v2` as it
is. Packing: https://github.com/AutoGPTQ/AutoGPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.files.tensors import DTYPES, FLOATS, StoredTensor
from adaptrix_export.load.quantized.bits import Whole, unpack_words, words_of
from adaptrix_export.load.quantized.parts import check_part, gathered
from adaptrix_export.plan import Array, Tensor

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what was taken from each zero point
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqTensor(Whole):
    name: str
    dtype: str
    shape: tuple[int, int]
    bits: int
    less: int
    numbers: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    groups: StoredTensor

    @property
    def form(self) -> str:
        return f"{self.bits} bits in {self.scales.shape[0]} groups"

    def decode(self) -> Array:
        rows, columns = self.shape
        numbers = unpack_words(self.numbers.read(), self.bits, columns, axis=0)
        zeros = unpack_words(self.zeros.read(), self.bits, rows, axis=1)
        zeros = (zeros + np.uint8(self.less)) & np.uint8(2**self.bits - 1)
        group = self.groups.read()
        steps = numbers.astype(np.float32) - zeros.astype(np.float32)[group]
        scaled: Array = steps * self.scales.read().astype(np.float32)[group]
        return scaled.astype(DTYPES[self.dtype]).T


def read_gptq(
    place: str, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, each quantized weight with its parts as one tensor.

    Raises SourceError for parts that do not fit each other, UnsupportedError for a layout of one
    kernel and for bits that change from module to module.
    """
    bits, kind = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in BITS or kind not in FORMATS or settings.get("dynamic"):
        what = "modules of other bits (dynamic)" if settings.get("dynamic") else f"{bits} bits"
        raise UnsupportedError(
            f"{place}: quantization_config", f"{what}, checkpoint_format {kind!r}",
            f"{' '.join(map(str, BITS))} bits, {' or '.join(FORMATS)}",
            "save it again in the format gptq, or name the unquantized model as the base",
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for module in gathered(place, stored, PARTS, tensors):
        numbers, zeros, scales, groups = module.parts
        columns, rows = groups.shape[0], scales.shape[-1]
        check_part(place, numbers, ("I32",), (words_of(columns, bits), rows))
        check_part(place, scales, FLOATS, (scales.shape[0], rows))
        check_part(place, zeros, ("I32",), (scales.shape[0], words_of(rows, bits)))
        check_part(place, groups, ("I32", "I64"), (columns,))
        tensors[f"{module.name}.weight"] = GptqTensor(
            module.stored("weight"), scales.dtype, (rows, columns), bits, FORMATS[kind],
            numbers, zeros, scales, groups,
        )  # fmt: skip
    return tensors
