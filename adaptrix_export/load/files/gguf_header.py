"""The header of a GGUF file, read with size limits.

A 43-byte file that claims an array of 2^63 items hangs readers without limits, so every count is
compared with the bytes that are left. Format: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.regular import require_regular

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
MAX_DIMS = 4
# The largest vocabularies have 262,144 tokens with as many scores and types, and twice the merges.
MAX_ITEMS = 2_000_000  # of all arrays; readers of other libraries take microseconds for each
MAX_ENTRIES = 200_000  # pairs and tensors
MAX_STRING = 8 << 20  # bytes; a chat template has some thousands


@dataclass(frozen=True)
class GgufTensor:
    """`shape` in PyTorch's order (slowest axis first); `offset` counts from byte 0 of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


class _Reader:
    def __init__(self, data: mmap.mmap, place: str) -> None:
        self.data, self.at, self.place = data, 0, place
        self.items = 0  # of arrays so far

    def fail(self, found: str, expected: str) -> SourceError:
        return SourceError(self.place, found, expected, "fetch the file again")

    def take(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        if size > len(self.data) - self.at:
            raise self.fail(f"{len(self.data)} bytes", "a whole GGUF header")
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return value

    def count(self, smallest: int) -> int:
        """A count of items that take at least `smallest` bytes each."""
        n: int = self.take("Q")
        if n * smallest > len(self.data) - self.at:
            raise self.fail(f"a count of {n} at byte {self.at - 8}", "one that fits the file")
        return n

    def entries(self, smallest: int) -> int:
        n = self.count(smallest)
        if n > MAX_ENTRIES:
            raise self.fail(f"{n} pairs or tensors", f"at most {MAX_ENTRIES}")
        return n

    def string(self) -> str:
        n = self.count(1)
        if n > MAX_STRING:
            raise self.fail(f"a text of {n} bytes at byte {self.at - 8}", f"at most {MAX_STRING}")
        raw = self.data[self.at : self.at + n]
        self.at += n
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 2:
            return self.array(self.take("I"), depth)
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        raise self.fail(f"value type {kind} at byte {self.at}", "a type of GGUF version 3")

    def array(self, item: int, depth: int) -> list[Any]:
        size = struct.calcsize("<" + _SCALARS[item]) if item in _SCALARS else 8
        count = self.count(size)
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.fail(f"{self.items} values in arrays", f"at most {MAX_ITEMS}")
        if item in _SCALARS:
            form = f"<{count}{_SCALARS[item]}"
            self.at += count * size
            return list(struct.unpack_from(form, self.data, self.at - count * size))
        return [self.value(item, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> GgufHeader:
    """Metadata and tensor directory. Raises SourceError for an inconsistent or truncated file."""
    size = require_regular(path)
    if size < 24:
        raise SourceError(path.name, f"{size} bytes", "a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path.name)
        if data[:4] != b"GGUF":
            raise reader.fail(f"magic {data[:4]!r}", "b'GGUF'")
        reader.at = 4
        version = reader.take("I")
        if version not in (2, 3):
            raise reader.fail(f"GGUF version {version}", "2 or 3")
        tensor_count, pair_count = reader.entries(24), reader.entries(12)
        metadata = {}
        for _ in range(pair_count):
            key = reader.string()
            metadata[key] = reader.value(reader.take("I"))
        entries = [_entry(reader) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise reader.fail(f"alignment {alignment}", "a positive number")
        start = -(-reader.at // alignment) * alignment
        tensors = tuple(_placed(reader, e, start, len(data)) for e in entries)
    if len({t.name for t in tensors}) != len(tensors):
        raise SourceError(path.name, "a duplicate tensor name", "each name once")
    return GgufHeader(metadata, tensors)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = reader.string(), reader.take("I")
    if dims > MAX_DIMS:
        raise reader.fail(f"{name}: {dims} dimensions", f"at most {MAX_DIMS}")
    shape = tuple(reversed([reader.take("Q") for _ in range(dims)]))
    return name, shape, reader.take("I"), reader.take("Q")


def _placed(
    reader: _Reader, entry: tuple[str, tuple[int, ...], int, int], start: int, size: int
) -> GgufTensor:
    name, shape, kind, offset = entry
    tensor = GgufTensor(name, shape, kind, start + offset)
    if tensor.offset + stored_bytes(reader.place, tensor) > size:
        raise reader.fail(f"{name} ends past the file's {size} bytes", "the whole tensor")
    return tensor


def stored_bytes(place: str, tensor: GgufTensor) -> int:
    """Bytes that the tensor takes in the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    except (ValueError, KeyError):
        raise SourceError(
            f"{place}: {tensor.name}", f"ggml type {tensor.ggml_type}", "a known one"
        ) from None
    values = prod(tensor.shape)
    if tensor.shape and tensor.shape[-1] % block:
        raise SourceError(
            f"{place}: {tensor.name}", f"rows of {tensor.shape[-1]}", f"a multiple of {block}"
        )
    return int(values // block * size)
