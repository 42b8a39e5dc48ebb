"""A safetensors file: same tensors, same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.load.files.tensors import itemsize
from adaptrix_export.plan import Tensor
from adaptrix_export.save.writer import HashingWriter


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one file, tensors of wide dtypes first so that all are aligned, then by name."""
    ordered = sorted(tensors.items(), key=lambda item: (-itemsize(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + prod(tensor.shape) * itemsize(tensor.dtype)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashingWriter(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            out.write_array(tensor.read())
