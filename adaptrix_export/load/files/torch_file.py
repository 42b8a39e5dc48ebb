"""Files written by `torch.save`: a zip archive of a pickle and one member for each storage.

The archive is checked before its pickle is interpreted. Members are stored uncompressed, so a
tensor is an offset in the file and is read on demand.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.pickled import MAX_PICKLE, PickledTensor, describe_pickle
from adaptrix_export.load.files.regular import require_regular
from adaptrix_export.load.files.tensors import DTYPES, StoredTensor
from adaptrix_export.load.files.views import Transposed
from adaptrix_export.plan import Tensor

MAX_MEMBERS = 100_000
MAX_DIRECTORY = 8 << 20  # bytes; a member of torch.save takes about 80
_END = struct.Struct("<12xI6x")  # end of the directory: its length
_FAR = struct.Struct("<40xQ8x")  # the same of an archive beyond 4 GB
_LOCAL = struct.Struct("<4s22xHH")  # magic, then the lengths of name and extra field
_ENCRYPTED = 1
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError)


@dataclass(frozen=True)
class Member:
    """Offset and size of an archive member in the file."""

    offset: int
    size: int


def read_torch_file(path: Path) -> Any:
    """The saved object, with each tensor as a reference into the file; nothing is unpickled.

    Raises SourceError for a damaged or implausible file, UnsupportedError for a pickle that may run
    code and for files written before torch 1.6, which are bare pickles.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:1] == b"\x80":
        raise UnsupportedError(
            path.name, "a bare pickle, as before torch 1.6", "a zip archive by torch.save",
            "load and save it again with a current torch, where you trust it",
        )  # fmt: skip
    members = check_archive(path)
    pickles = [name for name in members if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise SourceError(path.name, f"{len(pickles)} members data.pkl", "one")
    root = pickles[0].removesuffix("data.pkl")
    _check_byte_order(path, members.get(f"{root}byteorder"))
    value = describe_pickle(_bytes(path, members[pickles[0]], MAX_PICKLE), path.name)
    return _Places(path, root, members).of(value)


def check_archive(path: Path) -> dict[str, Member]:
    """Members by name. Raises SourceError for compressed, out-of-bounds or overlapping members."""
    size = require_regular(path)
    try:
        _check_directory(path, size)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _BAD_ZIP as error:
        raise SourceError(
            path.name, f"not a zip archive ({error})", "a file by torch.save", "fetch it again"
        ) from error
    if len(infos) > MAX_MEMBERS:
        raise SourceError(path.name, f"{len(infos)} members", f"at most {MAX_MEMBERS}")
    members: dict[str, Member] = {}
    for info in infos:
        wrong = _problem(info, size)
        if wrong or info.filename in members:
            raise SourceError(
                f"{path.name}: {info.filename}", wrong or "a duplicate name",
                "a stored member within the file", "fetch it again",
            )  # fmt: skip
        members[info.filename] = Member(_start(path, info), info.file_size)
    _check_overlaps(path, members, size)
    return members


def _check_directory(path: Path, size: int) -> None:
    """Raise ValueError for a directory that is too long to be read into memory."""
    with path.open("rb") as file:
        file.seek(max(0, size - (1 << 16) - _END.size - _FAR.size))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        return  # no archive, as zipfile will say
    (length,) = _END.unpack_from(tail, at)
    far = tail.rfind(b"PK\x06\x06", 0, at)
    if length == 0xFFFFFFFF and far >= 0:
        (length,) = _FAR.unpack_from(tail, far)
    if length > MAX_DIRECTORY:
        raise ValueError(f"a directory of {length} bytes, more than {MAX_DIRECTORY}")


def _problem(info: zipfile.ZipInfo, size: int) -> str:
    name = info.orig_filename
    if name != info.filename or name.startswith("/") or "\\" in name or "\0" in name:
        return "an absolute or strange name"
    if ".." in PurePosixPath(name).parts:
        return "a name that leaves the archive"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return f"compressed, {info.compress_size} bytes for {info.file_size}"
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    if not 0 <= info.header_offset <= size - info.file_size - _LOCAL.size:
        return f"{info.file_size} bytes at {info.header_offset}, in a file of {size}"
    return ""


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes after its local header, which must have the member's name."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        magic, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
        name = file.read(name_length)
    if magic != b"PK\x03\x04" or name != info.filename.encode():
        raise SourceError(
            f"{path.name}: {info.filename}", f"a local header for {name[:80]!r}", "its own"
        )
    return info.header_offset + _LOCAL.size + int(name_length) + int(extra_length)


def _check_overlaps(path: Path, members: dict[str, Member], size: int) -> None:
    end, before = 0, ""
    for name, member in sorted(members.items(), key=lambda m: (m[1].offset, m[1].size)):
        last = member.offset + member.size
        if member.offset < end or last > size:
            problem = f"which overlap {before}" if member.offset < end else f"of a file of {size}"
            raise SourceError(
                f"{path.name}: {name}", f"bytes {member.offset} to {last}, {problem}",
                "members within the file that do not overlap", "fetch it again",
            )  # fmt: skip
        end, before = last, name


def _check_byte_order(path: Path, member: Member | None) -> None:
    if member is not None and _bytes(path, member, 16) != b"little":
        raise UnsupportedError(path.name, "big-endian values", "little-endian", "save it again")


def _bytes(path: Path, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise SourceError(path.name, f"a member of {member.size} bytes", f"at most {limit}")
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


@dataclass
class _Places:
    """Resolves tensors to offsets in the file; a dict that is referenced often is resolved once."""

    path: Path
    root: str
    members: dict[str, Member]
    done: dict[int, Any] = field(default_factory=dict)

    def of(self, value: Any, depth: int = 0) -> Any:
        """`value` with references for tensors, in dicts down to the third level."""
        if isinstance(value, PickledTensor):
            return self._tensor(value)
        if not isinstance(value, dict) or depth == 3:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = {k: self.of(v, depth + 1) for k, v in value.items()}
        return self.done[id(value)]

    def _tensor(self, value: PickledTensor) -> Tensor:
        storage, place = value.storage, f"{self.path.name}: tensor in {value.storage.key!r}"
        member = self.members.get(f"{self.root}data/{storage.key}")
        width = DTYPES[storage.dtype].itemsize
        if member is None or member.size != storage.count * width:
            problem = f"{member.size} bytes" if member else "no such member"
            raise SourceError(place, problem, f"{storage.count * width} bytes", "fetch it again")
        if value.offset + prod(value.shape) > storage.count:
            raise SourceError(place, f"shape {list(value.shape)} at {value.offset}", "within it")
        offset = member.offset + value.offset * width
        if _follows(value.shape, value.strides):
            return StoredTensor("", storage.dtype, value.shape, self.path, offset)
        if len(value.shape) == 2 and _follows(value.shape[::-1], value.strides[::-1]):
            turned = StoredTensor("", storage.dtype, value.shape[::-1], self.path, offset)
            return Transposed(turned, by_format=True)
        raise UnsupportedError(
            place, f"strides {list(value.strides)} for shape {list(value.shape)}", "whole tensors",
            "save it with .contiguous()",
        )  # fmt: skip


def _follows(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are those of a contiguous tensor."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected and 0 not in shape:
            return False
        expected *= size
    return True
