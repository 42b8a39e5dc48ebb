"""GPTQ, AWQ, compressed-tensors, HQQ and MXFP4 for the oracle, a module at a time, by torch alone.

None of the loader's routines are used; the formats are described in `load/quantized/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]
OTHERS = ("sinks", "gate_up_proj_bias", "down_proj_bias")  # parameters of gpt-oss
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def packed_state(stored: State, settings: Mapping[str, Any], dtype: torch.dtype) -> State:
    """Every tensor of a checkpoint by its plain name, its packed weights as floats."""
    method = METHODS[settings["quant_method"]]
    state: State = {}
    for name, tensor in stored.items():
        module, _, ending = name.rpartition(".")
        made = method(stored, module, ending, settings, dtype)
        if made is not None:
            experts = ending.endswith("_blocks")
            state[name.removesuffix("_blocks") if experts else f"{module}.weight"] = made
        elif ending in ("weight", "bias") or ending in OTHERS:
            state[name] = tensor
    return state


def _field(words: torch.Tensor, bits: int, number: int) -> torch.Tensor:
    """Number `number` of each row of a bit stream in int32 words (words, columns)."""
    field = torch.zeros(words.shape[1], dtype=torch.int64)
    for bit in range(bits):
        word, shift = divmod(number * bits + bit, 32)
        field |= ((words[word].long() >> shift) & 1) << bit
    return field


def _stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(count, columns) numbers of a bit stream that runs down the columns."""
    return torch.stack([_field(words, bits, number) for number in range(count)])


def _gptq(
    stored: State, module: str, ending: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    if ending != "qweight":
        return None
    bits, groups = settings["bits"], stored[f"{module}.g_idx"].long()
    scales = stored[f"{module}.scales"]
    numbers = _stream(stored[f"{module}.qweight"], bits, len(groups))
    zeros = _stream(stored[f"{module}.qzeros"].T, bits, scales.shape[1]).T
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) % 2**bits
    return ((numbers - zeros[groups]).to(scales.dtype) * scales[groups]).T.contiguous()


def _awq(
    stored: State, module: str, ending: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    if ending != "qweight":
        return None
    scales = stored[f"{module}.scales"]
    numbers, zeros = (_interleaved(stored[f"{module}.{part}"]) for part in ("qweight", "qzeros"))
    group = torch.arange(len(numbers)) * len(scales) // len(numbers)
    return ((numbers - zeros[group]).to(scales.dtype) * scales[group]).T.contiguous()


def _interleaved(words: torch.Tensor) -> torch.Tensor:
    """Even columns of eight lie in the lower half of a word, odd ones in the upper."""
    numbers = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
    for column in range(8):
        place = column // 2 + (4 if column % 2 else 0)
        numbers[:, column::8] = (words.long() >> (4 * place)) & 15
    return numbers


def _compressed(
    stored: State, module: str, ending: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    scales = stored.get(f"{module}.weight_scale")
    if scales is None or ending not in ("weight", "weight_packed"):
        return None
    zeros = stored.get(f"{module}.weight_zero_point")
    rows = [group["weights"] for group in settings["config_groups"].values()]
    if ending == "weight_packed":
        out, columns = stored[f"{module}.weight_shape"].tolist()
        words = stored[f"{module}.weight_packed"].T
        bits = next(
            row["num_bits"] for row in rows if -(-columns * row["num_bits"] // 32) == len(words)
        )
        numbers = _stream(words, bits, columns).T - 2 ** (bits - 1)
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = _stream(zeros, bits, out) - 2 ** (bits - 1)
    else:
        numbers = stored[f"{module}.weight"]
    values: torch.Tensor = numbers.to(dtype)
    block = next((row["block_structure"] for row in rows if row.get("strategy") == "block"), None)
    if zeros is not None:
        values = values - _over(zeros.to(dtype), values.shape, block)
    return values * _over(scales.to(dtype), values.shape, block)


def _over(values: torch.Tensor, shape: torch.Size, block: list[int] | None) -> torch.Tensor:
    if values.numel() == 1:
        return values.reshape(1, 1)
    for axis in (0, 1):
        tile = block[axis] if block else shape[axis] // values.shape[axis]
        values = values.repeat_interleave(tile, axis).narrow(axis, 0, shape[axis])
    return values


def _hqq(
    stored: State, module: str, ending: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    if ending != "W_q":
        return None
    bits = int(stored[f"{module}.nbits"])
    shape = torch.Size(stored[f"{module}.shape"].tolist())
    words = stored[f"{module}.W_q"]
    words = words if words.dtype in (torch.uint8, torch.int32) else words.view(torch.uint8)
    top = {3: 27}.get(bits, 8 - bits)
    numbers = torch.cat([(words >> shift) & (2**bits - 1) for shift in range(top, -1, -bits)])
    numbers = numbers[: shape.numel() // words.shape[1]].to(dtype)
    scales, zeros = (stored[f"{module}.{part}"].to(dtype) for part in ("scale", "zero"))
    return ((numbers - zeros) * scales).reshape(shape)


def _mxfp4(
    stored: State, module: str, ending: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    if not ending.endswith("_blocks"):
        return None
    packed = stored[f"{module}.{ending}"].long()
    powers = stored[f"{module}.{ending.removesuffix('_blocks')}_scales"].double() - 127
    levels = torch.tensor(E2M1).double()
    pairs = torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)
    values = levels[pairs % 8] * (1 - 2 * (pairs // 8)) * 2 ** powers.unsqueeze(-1)
    return values.flatten(-2).to(dtype).transpose(1, 2).contiguous()


Method = Callable[[State, str, str, Mapping[str, Any], torch.dtype], "torch.Tensor | None"]
METHODS: dict[str, Method] = {
    "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "hqq": _hqq, "mxfp4": _mxfp4
}  # fmt: skip
