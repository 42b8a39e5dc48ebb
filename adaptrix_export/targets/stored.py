"""Reads an artifact's tensors back from its bytes, by none of the code that wrote them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.runtime.layout import ONNX_FOLDER

Stored = NDArray[Any]

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; a name that leads out of it, or to a link, is refused."""
    parts = PurePosixPath(name)
    path = folder / name
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ParityError(
            "artifact", f"it names the data file {name!r}", "a path inside its folder"
        )
    if not path.is_file() or path.is_symlink():
        raise ParityError("artifact", f"its data file {name!r} is missing or a link")
    if folder.resolve() not in path.resolve().parents:
        raise ParityError("artifact", f"{name!r} resolves outside", "a path inside its folder")
    return path


class StoredTensors:
    """Tensors of an artifact by name: `names()`, and `read(name)`, memory-mapped and read-only."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def names(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str) -> Stored:
        return np.asarray(self._tensors[name]())


def open_onnx(folder: Path) -> StoredTensors:
    """The initializers of every graph in `folder`."""
    import onnx_ir as ir

    tensors: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for file in _graphs(folder):
        for name, value in ir.load(inside(folder, file)).graph.initializers.items():
            constant = value.const_value
            if constant is None:
                raise ParityError(file, f"initializer {name!r} has no values")
            if isinstance(constant, ir.ExternalTensor):
                _check_extent(
                    inside((folder / file).parent, str(constant.location)), constant, name
                )
                if name in seen and not _same(seen[name], constant):
                    raise ParityError(file, f"another initializer {name!r} than the other graph's")
                seen[name] = constant
            tensors[name] = constant.numpy
            if isinstance(constant, ir.ExternalTensor) and constant.dtype.bitwidth >= 8:
                tensors[name] = partial(_mapped, constant)
    return StoredTensors(tensors)


def _same(one: Any, other: Any) -> bool:
    """Whether two graphs mean the same values: one place of one file, or equal bytes."""
    if (one.dtype, tuple(one.shape.numpy())) != (other.dtype, tuple(other.shape.numpy())):
        return False
    if (one.path, one.offset) == (other.path, other.offset):
        return True
    return bool(np.array_equal(_raw(one), _raw(other)))


def _raw(constant: Any) -> Stored:
    if not constant.nbytes:
        return np.empty(0, np.uint8)
    start = constant.offset or 0
    return np.memmap(constant.path, np.uint8, mode="r", offset=start, shape=(constant.nbytes,))


def _mapped(constant: Any) -> Stored:
    """A mapping of its own for each read: the pages of one tensor at a time count as memory."""
    shape, dtype = tuple(constant.shape.numpy()), constant.dtype.numpy()
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(constant.path, dtype, mode="r", offset=constant.offset or 0, shape=shape)


def _graphs(folder: Path) -> list[str]:
    """Every graph of an artifact: one, or one for each part of the model."""
    places = [*folder.glob("*.onnx"), *(folder / ONNX_FOLDER).glob("*.onnx")]
    names = sorted(path.relative_to(folder).as_posix() for path in places)
    return names or ["model.onnx"]


def _check_extent(path: Path, tensor: Any, name: str) -> None:
    end = (tensor.offset or 0) + tensor.nbytes
    if tensor.length not in (None, tensor.nbytes) or end > path.stat().st_size:
        raise ParityError(
            "model.onnx",
            f"initializer {name!r} ends at byte {end} of {path.name}",
            f"{tensor.nbytes} bytes within {path.stat().st_size}",
        )


def open_safetensors(folder: Path) -> StoredTensors:
    """The tensors of one file, or of the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return StoredTensors(_shard(inside(folder, "model.safetensors")))
    placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Any] = {}
    for file in sorted(set(placed.values())):
        shard = _shard(inside(folder, file))
        listed = {name for name, where in placed.items() if where == file}
        if listed != set(shard):
            odd = min(listed ^ set(shard))
            raise ParityError(file, f"tensor {odd!r} is in the file or the index, not in both")
        tensors.update(shard)
    return StoredTensors(tensors)


def _shard(path: Path) -> dict[str, Any]:
    """Readers of one file's tensors. Format: 8-byte length, JSON header, then the bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ParityError(path.name, f"{size} bytes", "a whole safetensors file")
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    header.pop("__metadata__", None)
    return {name: _reader(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # the format lets a name occur twice and readers differ on which one counts
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        raise ParityError("safetensors header", "a name that occurs twice")
    return by_name


def _reader(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> Any:
    if entry["dtype"] not in _DTYPES:
        raise ParityError(path.name, f"tensor {name!r} has dtype {entry['dtype']}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    count = int(np.prod(shape, dtype=np.int64))
    if begin < 0 or end - begin != count * dtype.itemsize or data + end > size:
        raise ParityError(path.name, f"tensor {name!r} has bytes {begin} to {end} for {shape}")

    def read() -> Stored:
        if count == 0:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=data + begin, shape=shape)

    return read
