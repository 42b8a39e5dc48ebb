"""Tensors in safetensors files: headers are read with size limits, values on demand.

The safetensors library maps the whole file and accepts duplicate keys, gaps and unknown fields.
This compiler promises bounded memory and exact inputs, so it reads the header (an 8-byte length,
JSON, then the values) itself. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.regular import require_regular
from adaptrix_export.plan import Array

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a delta can be added to
MAX_HEADER = 32 << 20  # bytes; a LoRA on each of 6,144 experts has 6 MB
# Brackets, braces and commas of a JSON text. Each may become an object of some 70 bytes; an index
# has one for each tensor, a header eight.
MOST_PARTS = 900_000
MAX_DIMENSIONS = 64  # of PyTorch and numpy


class ByRows(ABC):
    """A `plan.Tensor` that is decoded row by row: `read()` is `rows(0, shape[0])`."""

    shape: Any  # tuple[int, ...], as a field or as a property

    def read(self) -> Array:
        return self.rows(0, self.shape[0])

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in a file as plain little-endian values; `offset` counts from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        return self._values(0, prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        row = prod(self.shape[1:])
        return self._values(start * row, (stop - start) * row).reshape(-1, *self.shape[1:])

    def _values(self, first: int, count: int) -> Array:
        dtype = DTYPES[self.dtype]
        values = np.fromfile(
            self.path, dtype=dtype, count=count, offset=self.offset + first * dtype.itemsize
        )
        if len(values) != count:
            raise SourceError(
                f"{self.path.name}: {self.name}",
                f"{len(values)} values",
                f"{count}",
                "the file was cut short while it was read; fetch it again",
            )
        return values


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: its unchanged header bytes, and its tensors in the order of their offsets."""

    path: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of one file; no tensor is read.

    Raises SourceError for damage that shows in the header: a truncated file, duplicate names, gaps,
    overlaps, sizes that do not fit their shapes.
    """
    damaged = "fetch or save the file again"
    size = require_regular(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise SourceError(path.name, f"{size} bytes", "a whole safetensors file", damaged)
        header = file.read(length)
    try:
        entries = json.loads(_few_parts(header, MOST_PARTS), object_pairs_hook=_no_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        tensors = [_tensor(path, name, e, 8 + length) for name, e in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            path.name, f"a header that cannot be read ({error})", "safetensors", damaged
        ) from error
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_bytes(path, tensors, 8 + length, size)
    return SafetensorsFile(path, header, tuple(tensors), metadata)


def _few_parts(text: bytes, most: int) -> bytes:
    """The text itself. Raises ValueError for more values than a file of this kind has."""
    parts = sum(map(text.count, (b"{", b"[", b",")))
    if parts > most:
        raise ValueError(f"{parts} values in lists and objects, more than {most}")
    return text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate name {twice!r}")
    return document


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{path.name}: {name}", f"dtype {dtype}", " ".join(DTYPES), "convert the file first"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {len(shape)} dimensions")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has shape {shape} and offsets {begin}, {end}")
    tensor = StoredTensor(name, dtype, shape, path, start + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name!r} has {end - begin} bytes for shape {list(shape)} {dtype}")
    return tensor


def _check_bytes(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Refuse gaps, overlaps, and bytes after the last tensor."""
    for tensor in tensors:
        if tensor.offset != start:
            raise SourceError(
                f"{path.name}: {tensor.name}", f"data at byte {tensor.offset}", f"byte {start}",
                "the tensors overlap or leave a gap; save the file again",
            )  # fmt: skip
        start += tensor.nbytes
    if start != size:
        raise SourceError(
            path.name, f"{size} bytes", f"{start} by its header",
            "the file is cut short or has a tail; fetch it again",
        )  # fmt: skip


def read_json(path: Path, limit: int = 32 << 20, parts: int = MOST_PARTS) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes and `parts` values; SourceError names what
    is wrong."""
    try:
        size = require_regular(path)
        if size > limit:
            raise SourceError(path.name, f"{size} bytes", f"at most {limit}")
        raw = path.read_bytes()
        if raw.startswith(BOM_UTF8):
            raise SourceError(
                path.name, "a byte order mark, at which transformers and PEFT stop", "plain UTF-8",
                "save it again as UTF-8 without a byte order mark",
            )  # fmt: skip
        value = json.loads(_few_parts(raw, parts), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise SourceError(
            str(path.parent.name), f"no {path.name}", "one", "check the folder"
        ) from None
    except OSError as error:
        raise SourceError(
            path.name, f"cannot be read ({error.strerror})", "a readable file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            path.name, f"not JSON ({error})", "a JSON object", "save it again"
        ) from error
    if not isinstance(value, dict):
        raise SourceError(path.name, f"a JSON {type(value).__name__}", "a JSON object")
    return value


@cache
def itemsize(dtype: str) -> int:
    """Bytes per value of a safetensors dtype name."""
    return DTYPES[dtype].itemsize
