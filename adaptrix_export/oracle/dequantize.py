"""Quantized bases for the oracle: dequantized by torch, with none of the loader's routines.

Only the child process imports this module. The formats are described in
`load/quantized/bitsandbytes.py` and `load/quantized/fp8.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from adaptrix_export.errors import ParityError
from adaptrix_export.load.quantized.four_bit import (
    LEVELS,  # a table, held against bitsandbytes in the tests
)
from adaptrix_export.oracle.packed import METHODS, packed_state

State = dict[str, torch.Tensor]
STATE = ".quant_state.bitsandbytes__"
BLOCK, NESTED_BLOCK = 64, 256


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` in a folder's config.json, if there is one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    return config


def dequantized_state(folder: Path, settings: Mapping[str, Any], model: Any) -> State:
    """The state dict of a quantized checkpoint, its quantized weights rounded as they were.

    `model` is the plain model, whose modules and config are looked at, not its weights.
    """
    stored: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(path))
    dtype = model.config.dtype or torch.float16
    if settings.get("quant_method") in METHODS:
        turned = _conv1d(model)
        made = packed_state(stored, settings, dtype)
        packed = {name for name in made if name not in stored}
        ends = tuple(f"{path}.weight" for path in turned)
        return {
            name: value.T.contiguous() if name in packed and name.endswith(ends) else value
            for name, value in made.items()
        }
    state, conv1d = {}, _conv1d(model)
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        key = next((k for k in stored if k.startswith(name + STATE)), None)
        if key is not None:
            value = _four_bit(stored, name, key)
        elif tensor.dtype == torch.int8:
            value = (tensor.float() * stored[module + ".SCB"].view(-1, 1) * (1 / 127)).to(dtype)
        elif tensor.dtype == torch.float8_e4m3fn:
            value = _fp8(tensor, stored[name + "_scale_inv"], settings, dtype)
        else:
            if name.endswith((".weight", ".bias")):  # the others are parts of quantized weights
                state[name] = tensor
            continue
        # bitsandbytes keeps a Conv1D as a Linear, its weight turned
        state[name] = value.T.contiguous() if module.endswith(conv1d) else value
    return state


def _conv1d(model: Any) -> tuple[str, ...]:
    """Paths of the model's Conv1D modules, without the base model's prefix, as endings."""
    prefix = model.base_model_prefix + "."
    paths = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return tuple(path.removeprefix(prefix) for path in paths)


def _four_bit(stored: State, name: str, key: str) -> torch.Tensor:
    facts = json.loads(bytes(stored[key].tolist()))
    count = torch.Size(facts["shape"]).numel()
    both = stored[name].flatten().view(torch.uint8)
    numbers = torch.stack([both >> 4, both & 15], dim=1).flatten()[:count]
    absmax = stored[name + ".absmax"]
    if name + ".nested_absmax" in stored:
        scales = stored[name + ".nested_absmax"].repeat_interleave(facts["nested_blocksize"])
        levels = stored[name + ".nested_quant_map"][absmax.long()]
        absmax = levels * scales[: len(levels)] + torch.tensor(facts["nested_offset"])
    scaled = stored[name + ".quant_map"][numbers.long()]
    scaled = scaled * absmax.float().repeat_interleave(facts["blocksize"])[:count]
    return scaled.to(getattr(torch, facts["dtype"])).reshape(facts["shape"])


def _fp8(
    weight: torch.Tensor, scales: torch.Tensor, settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    tile = settings.get("weight_block_size")
    if tile:
        rows, columns = weight.shape
        scales = scales.repeat_interleave(tile[0], 0)[:rows]
        scales = scales.repeat_interleave(tile[1], 1)[:, :columns]
    return (weight.float() * scales.float()).to(dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a plain checkpoint's matrices; ParityError where they differ."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            slices = (file.get_slice(key) for key in file.keys())  # noqa: SIM118 - not a dict
            names |= {piece.get_dtype() for piece in slices if len(piece.get_shape()) == 2}
    if len(names) != 1:
        raise ParityError(folder.name, f"matrices of {' and '.join(sorted(names))}", "one dtype")
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[names.pop()]


def simulate(model: Any, word: str, dtype: torch.dtype) -> None:
    """Quantize and dequantize, in place, every layer of `model` that bitsandbytes would take.

    `model` is in float32 and holds values of `dtype`, which is what the layer would give back.
    """
    double = word == "nf4-double"
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        turned = isinstance(module, Conv1D)
        weight = module.weight.data.T if turned else module.weight.data
        values = _round_trip(weight.contiguous().flatten(), double)
        values = values.to(dtype).float().reshape(weight.shape)
        module.weight.data = values.T.contiguous() if turned else values


def _round_trip(row: torch.Tensor, double: bool) -> torch.Tensor:
    blocks = torch.nn.functional.pad(row, (0, -len(row) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.where(absmax > 0, torch.ones(()))).unsqueeze(1)
    chosen = _nearest(scaled, torch.from_numpy(LEVELS["nf4"]))
    scales = _double(absmax) if double else absmax
    return (chosen * scales.unsqueeze(1)).flatten()[: len(row)]


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[torch.bucketize(values.contiguous(), (table[:-1] + table[1:]) / 2)]


def _double(absmax: torch.Tensor) -> torch.Tensor:
    """The scales after their own 8-bit quantization, less and plus their mean."""
    offset = absmax.mean()
    shifted = absmax - offset
    blocks = torch.nn.functional.pad(shifted, (0, -len(shifted) % NESTED_BLOCK))
    blocks = blocks.view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scaled = blocks * (1.0 / largest.where(largest > 0, torch.ones(())))
    return (_nearest(scaled, _dynamic()) * largest).flatten()[: len(absmax)] + offset


def _dynamic() -> torch.Tensor:
    """The dynamic 8-bit levels, https://arxiv.org/abs/1511.04561."""
    halves = [torch.zeros(1), torch.ones(1)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2)
        halves += [means, -means]
    return torch.cat(halves).sort().values
