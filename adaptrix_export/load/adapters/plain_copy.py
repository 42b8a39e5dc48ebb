"""A copy of an adapter in the form that PEFT reads, for adapters that PEFT's layers merge and whose
files PEFT cannot read: shards, a pickle, or keys with wrapper names.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.load.adapters.folders import CONFIG, WEIGHTS
from adaptrix_export.load.adapters.peft_keys import PREFIX, module_paths
from adaptrix_export.load.adapters.stored_weights import StoredWeights
from adaptrix_export.load.adapters.tuners import Tuner
from adaptrix_export.load.adapters.wrappers import note_of, strip_wrappers
from adaptrix_export.load.files.scratch import lasting_scratch
from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.load.files.views import FileTensor
from adaptrix_export.plan import Base


@dataclass(frozen=True)
class PlainCopy:
    """The folder, or None if PEFT can read the adapter's own; and notes on what was changed."""

    folder: Path | None
    notes: tuple[str, ...] = ()


def plain_copy(folder: Path, base: Base, tuner: Tuner, weights: StoredWeights) -> PlainCopy:
    """A copy of the adapter with one weights file and PEFT's keys, if it needs one."""
    modules = module_paths(base)

    def is_known(key: str) -> bool:
        part = tuner.part_of(key.removeprefix(PREFIX))
        shared = tuner.is_shared(key.removeprefix("base_model."))
        return shared or (key.startswith(PREFIX) and part is not None and part[0] in modules)

    tensors: dict[str, FileTensor] = {}
    words: list[str] = []
    count = 0
    for tensor in weights.tensors:
        name, stripped = strip_wrappers(tensor.name, is_known)
        tensors[name] = tensor
        words += stripped
        count += bool(stripped)
    if weights.usual and not count:
        return PlainCopy(None)
    made = lasting_scratch("adapter") / folder.resolve().name
    made.mkdir()
    shutil.copyfile(folder / CONFIG, made / CONFIG)
    _write(made / WEIGHTS, tensors)
    return PlainCopy(made, (note_of(count, tuple(words)),) if count else ())


def _write(path: Path, tensors: dict[str, FileTensor]) -> None:
    """A safetensors file: 8-byte length, JSON header, then the values, wide ones first."""
    ordered = sorted(tensors.items(), key=lambda i: (-DTYPES[i[1].dtype].itemsize, i[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            out.write(tensor.read().tobytes())
