"""Checkpoints as GPTQ, AWQ, compressed-tensors, HQQ and MXFP4 store them, with the values that they
stand for: numbers are drawn first and packed here, by the description of each format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
GROUP = 16


def stream(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words (words, columns) of numbers (count, columns): each column one long number."""
    words = -(-len(numbers) * bits // 32)
    columns = []
    for column in numbers.T.tolist():
        whole = sum(number << (bits * place) for place, number in enumerate(column))
        columns.append([(whole >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return torch.tensor(columns).T.to(torch.int64).to(torch.int32).contiguous()


def _drawn(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers (rows, columns), zero points and scales (rows, groups)."""
    groups = columns // GROUP
    numbers = torch.randint(0, 2**bits, (rows, columns))
    zeros = torch.randint(0, 2**bits, (rows, groups))
    scales = (0.01 + 0.02 * torch.rand(rows, groups)) * 16 / 2**bits
    return numbers, zeros, scales


def gptq(bits: int, kind: str) -> Callable[[int, int], tuple[Parts, torch.Tensor]]:
    def made(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
        numbers, zeros, scales = _drawn(rows, columns, bits)
        group = torch.randperm(columns) // GROUP  # as desc_act leaves them
        stored = (zeros - 1) % 2**bits if kind == "gptq" else zeros
        half = scales.half()
        parts = {
            "qweight": stream(numbers.T, bits), "scales": half.T.contiguous(),
            "qzeros": stream(stored, bits).T.contiguous(), "g_idx": group.to(torch.int32),
        }  # fmt: skip
        return parts, ((numbers - zeros[:, group]).double() * half[:, group].double()).half()

    return made


def awq(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    numbers, zeros, scales = _drawn(rows, columns, 4)
    half = scales.half()

    def packed(values: torch.Tensor) -> torch.Tensor:
        """(lines, columns): eight columns a word, those of even number first."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        eights = values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1)
        return torch.cat([stream(e.T, 4) for e in eights.reshape(len(values), -1, 8).unbind(1)]).T

    parts = {
        "qweight": packed(numbers.T).contiguous(), "qzeros": packed(zeros.T).contiguous(),
        "scales": half.T.contiguous(),
    }  # fmt: skip
    spread = [t.repeat_interleave(GROUP, 1) for t in (zeros, half)]
    return parts, ((numbers - spread[0]).double() * spread[1].double()).half()


def int_packed(bits: int, symmetric: bool) -> Callable[[int, int], tuple[Parts, torch.Tensor]]:
    def made(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
        numbers, zeros, scales = _drawn(rows, columns, bits)
        half, middle = scales.bfloat16(), 2 ** (bits - 1)
        parts = {
            "weight_packed": stream(numbers.T, bits).T.contiguous(), "weight_scale": half,
            "weight_shape": torch.tensor([rows, columns]),
        }  # fmt: skip
        if symmetric:
            zeros = torch.full_like(zeros, middle)
        else:
            parts["weight_zero_point"] = stream(zeros, bits)
        spread = [t.repeat_interleave(GROUP, 1) for t in (zeros, half)]
        return parts, ((numbers - spread[0]).double() * spread[1].double()).bfloat16()

    return made


def by_rows(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    """int8, a scale a row."""
    numbers = torch.randint(-127, 128, (rows, columns))
    scales = (0.001 + 0.001 * torch.rand(rows, 1)).bfloat16()
    value = (numbers.double() * scales.double()).bfloat16()
    return {"weight": numbers.to(torch.int8), "weight_scale": scales}, value


def floats(tile: tuple[int, int] | None) -> Callable[[int, int], tuple[Parts, torch.Tensor]]:
    """float8, one scale, or one for each tile of sizes that need not divide the matrix."""

    def made(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
        numbers = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
        shape = (-(-rows // tile[0]), -(-columns // tile[1])) if tile else (1,)
        scales = (0.0003 + 0.0003 * torch.rand(shape)).bfloat16()
        spread = scales
        if tile:
            down, across = torch.arange(rows) // tile[0], torch.arange(columns) // tile[1]
            spread = scales[down][:, across]
        value = (numbers.double() * spread.double()).bfloat16()
        return {"weight": numbers, "weight_scale": scales, "input_scale": torch.ones(1)}, value

    return made


def hqq(bits: int, axis: int) -> Callable[[int, int], tuple[Parts, torch.Tensor]]:
    def made(rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
        count = rows * columns // GROUP
        shape = (GROUP, count) if axis == 0 else (count, GROUP)
        numbers = torch.randint(0, 2**bits, shape)
        scales = (0.01 + 0.02 * torch.rand(count)).half().unsqueeze(axis)
        zeros = (torch.rand(count) * 2**bits).half().unsqueeze(axis)
        in_word, width = {8: (1, 8), 4: (2, 8), 3: (10, 30), 2: (4, 8), 1: (8, 8)}[bits]
        filled = torch.nn.functional.pad(numbers, (0, 0, 0, -len(numbers) % in_word))
        words = torch.zeros(len(filled) // in_word, shape[1], dtype=torch.int64)
        for place, piece in enumerate(filled.chunk(in_word)):
            words |= piece << (width - bits * (place + 1))
        parts = {
            "W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scales,
            "zero": zeros, "shape": torch.tensor([rows, columns]),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
        }  # fmt: skip
        return parts, ((numbers.half() - zeros) * scales).reshape(rows, columns)

    return made


def _group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": _group(**weights),
    }


TILE = (24, 40)
# Name -> (the config's quantization_config, how a matrix is stored, the dtype of the model).
FORMS: dict[str, tuple[dict[str, Any], Any, torch.dtype]] = {
    **{
        f"gptq {bits} bits {kind}": (
            {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True,
             "checkpoint_format": kind},
            gptq(bits, kind), torch.float16,
        )
        for bits, kind in ((4, "gptq"), (8, "gptq_v2"), (3, "gptq"), (2, "gptq_v2"))
    },
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        awq, torch.float16,
    ),
    "int4": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group"),
        int_packed(4, True), torch.bfloat16,
    ),
    "int4 with zero points": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", symmetric=False),
        int_packed(4, False), torch.bfloat16,
    ),
    "int8 packed": (
        _compressed("pack-quantized", num_bits=8, type="int", strategy="group"),
        int_packed(8, True), torch.bfloat16,
    ),
    "int8 by rows": (
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        by_rows, torch.bfloat16,
    ),
    "fp8": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        floats(None), torch.bfloat16,
    ),
    "fp8 by tiles": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="block",
                    block_structure=list(TILE)),
        floats(TILE), torch.bfloat16,
    ),
    **{
        f"hqq {bits} bits axis {axis}": (
            {"quant_method": "hqq", "quant_config": {}}, hqq(bits, axis), torch.float16
        )
        for bits, axis in ((4, 0), (4, 1), (3, 1), (8, 1), (2, 0), (1, 0))
    },
}  # fmt: skip


def save_packed(plain: Path, folder: Path, form: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in this form, of the shapes of the one in `plain`; and its values by name.

    Every matrix of a layer is packed; what else there is keeps the values that it has.
    """
    torch.manual_seed(5)
    settings, pack, dtype = FORMS[form]
    stored: Parts = {}
    values: Parts = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            parts, values[name] = pack(*tensor.shape)
            stored |= {name.removesuffix("weight") + key: value for key, value in parts.items()}
        else:
            stored[name] = values[name] = tensor.to(dtype)
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, values
