"""Bases whose config.json has a `quantization_config`: one row for each supported method.

Each quantized weight reads as a tensor of the dtype that the live layer multiplies with, the values
that training used; the config becomes that of a plain model of that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptrix_export.arch.architecture import split_path
from adaptrix_export.arch.families import Family
from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import StoredTensor
from adaptrix_export.load.files.views import Transposed
from adaptrix_export.load.quantized.awq import AwqTensor, read_awq
from adaptrix_export.load.quantized.bitsandbytes import (
    TORCH_DTYPES,
    EightBitTensor,
    FourBitTensor,
    read_bitsandbytes,
)
from adaptrix_export.load.quantized.compressed import CompressedTensor, read_compressed
from adaptrix_export.load.quantized.fp8 import Fp8Tensor, read_fp8
from adaptrix_export.load.quantized.gptq import GptqTensor, read_gptq
from adaptrix_export.load.quantized.hqq import HqqTensor, read_hqq
from adaptrix_export.load.quantized.mxfp4 import Mxfp4Tensor, read_mxfp4
from adaptrix_export.plan import Tensor

COMPUTING = ", computing in"
ORIGINAL = "name the unquantized model as the base"


@dataclass(frozen=True)
class Dequantized:
    """A quantized checkpoint as a plain one: tensors, config, and a description of the format."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    quantization: str


def dequantized(
    place: str,
    stored: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    family: Family,
) -> Dequantized:
    """Read a quantized checkpoint, `stored` by the names of the model.

    Raises UnsupportedError for a method without a row, SourceError for damage, and for a
    `quantization_config` beside plain weights.
    """
    settings = config["quantization_config"]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and settings.get("load_in_4bit"):
        method = "bitsandbytes"  # as written before transformers 4.35
    if method not in _METHODS:
        raise UnsupportedError(
            f"{place}: config.json", f"a base quantized with {method or 'a method without a name'}",
            "plain weights, or " + " or ".join(_METHODS), ORIGINAL,
        )  # fmt: skip
    tensors = _METHODS[method](place, stored, settings, _stated_dtype(config))
    quantized = [t for t in tensors.values() if isinstance(t, QUANTIZED)]
    if not quantized:
        raise SourceError(
            f"{place}: config.json", f"a quantization_config ({method}) over plain weights",
            "none, or quantized weights",
            "take it out; `base_weights: dequantized` with `simulate` quantizes plain weights",
        )  # fmt: skip
    dtypes = sorted({t.dtype for t in quantized})
    if len(dtypes) > 1:
        raise UnsupportedError(
            place, f"quantized weights of {' and '.join(dtypes)}", "one dtype", ORIGINAL
        )
    if family.conv1d:
        tensors = {n: _turned(n, t) for n, t in tensors.items()}
    plain = _plain(config, dtypes[0])
    description = _described(method, quantized)
    computing = settings.get("bnb_4bit_compute_dtype") if settings.get("load_in_4bit") else None
    if computing not in (None, plain.get("dtype"), plain.get("torch_dtype")):
        description += f"{COMPUTING} {computing}"
    return Dequantized(tensors, plain, description)


def _stated_dtype(config: Mapping[str, Any]) -> str:
    """The dtype in the config; transformers quantizes from float16 by default."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return TORCH_DTYPES.get(str(stated), "F16")


def _plain(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config without its quantization, and with the dtype that the weights now have."""
    name = next(n for n, short in TORCH_DTYPES.items() if short == dtype)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    keys = [key for key in ("dtype", "torch_dtype") if key in plain] or ["dtype"]
    return {**plain, **dict.fromkeys(keys, name)}


def _described(method: str, quantized: list[Any]) -> str:
    """`bitsandbytes nf4, double quantization`, for people and for the manifest."""
    kinds = sorted({_kind(tensor) for tensor in quantized})
    return f"{method} {' and '.join(kinds)}"


def _kind(tensor: Any) -> str:
    if isinstance(tensor, FourBitTensor):
        double = " with double quantization" if tensor.nested else ""
        return f"{tensor.kind}{double} in blocks of {tensor.block}"
    if isinstance(tensor, Fp8Tensor):
        return "by tiles" if tensor.tile else "by tensors"
    return "int8" if isinstance(tensor, EightBitTensor) else str(tensor.form)


def _turned(name: str, tensor: Tensor) -> Tensor:
    """bitsandbytes stores the weight of a Conv1D as that of a Linear."""
    in_stack = split_path(name)[1] is not None
    return (
        Transposed(tensor, is_kept=True) if in_stack and isinstance(tensor, QUANTIZED) else tensor
    )


Method = Callable[[str, Mapping[str, StoredTensor], Mapping[str, Any], str], dict[str, Tensor]]
QUANTIZED = (
    FourBitTensor, EightBitTensor, Fp8Tensor, GptqTensor, AwqTensor, CompressedTensor, HqqTensor,
    Mxfp4Tensor,
)  # fmt: skip
_METHODS: dict[str, Method] = {
    "bitsandbytes": lambda place, stored, settings, dtype: read_bitsandbytes(place, stored, dtype),
    "fp8": read_fp8,
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "hqq": read_hqq,
    "mxfp4": read_mxfp4,
}
