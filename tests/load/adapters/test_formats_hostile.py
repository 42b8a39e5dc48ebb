"""Hostile and damaged zip archives and pickles: a named error, soon, and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptrix_export.errors import InputError, SourceError, UnsupportedError
from adaptrix_export.load.files.pickled import MAX_PICKLE
from adaptrix_export.load.files.torch_file import read_torch_file


def archive(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, kind)
    return path


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/adaptrix-was-here",)


PROTO = b"\x80\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
BOMBS = {
    "runs a program": (pickle.dumps(Attack(), 2), "posix.system"),
    "eval": (b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "__builtin__.eval"),
    "a class by its name": (b"\x80\x02ctorch.nn\nModule\n)R.", "torch.nn.Module"),
    "new-style objects": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a string longer than the file": (PROTO + b"X\xff\xff\xff\x7fab.", "damaged pickle"),
    "no end": (PROTO + b"}" * 1000, "damaged pickle"),
    "an empty stack": (PROTO + b"R.", "damaged pickle"),
    "a mark that is not there": (PROTO + b"t.", "damaged pickle"),
    "two values": (PROTO + b"}}.", "damaged pickle"),
    "a key twice": (PROTO + b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "duplicate key 'a'"),
    "memo of nothing": (PROTO + b"h\x07.", "damaged pickle"),
    "a deep tuple as a key": (PROTO + b"})" + b"\x85" * 100_000 + b"K\x01s.", "a key of"),
    "a function called with rubbish": (PROTO + TENSOR + b")R.", "damaged pickle"),
    "a huge shape": (
        PROTO + TENSOR + b"((K\x00K\x00q\x00" + b"h\x00" * 100_000 + b"tq\x01h\x01h\x01h\x01tR.",
        "damaged pickle",
    ),
    "build on a function": (PROTO + TENSOR + b"}b.", "damaged pickle"),
    "not a pickle": (b"hello", "damaged pickle"),
    "nothing": (b"", "damaged pickle"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, bomb):
    data, message = BOMBS[bomb]
    path = archive(tmp_path / "layer_0.pt", {"x/data.pkl": data})
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        read_torch_file(path)
    assert time.process_time() - start < 5
    assert not Path("/tmp/adaptrix-was-here").exists()


def test_a_pickle_that_names_one_dict_a_million_times_ends(tmp_path):
    """Walked naively, 140 000 names of a dict of 140 000 keys are 2e10 steps."""
    keys = [b"J" + struct.pack("<i", i) for i in range(140_000)]
    inner = b"}q\x00(" + b"N".join(keys) + b"Nu"
    data = PROTO + b"}(J\xff\xff\xff\xff" + inner + b"h\x00".join([b"", *keys])[2:] + b"h\x00u."
    start = time.process_time()
    found = read_torch_file(archive(tmp_path / "a.pt", {"x/data.pkl": data}))
    assert len(found) == 140_001 and all(value is found[-1] for value in found.values())
    assert time.process_time() - start < 20


def test_a_long_pickle_is_refused_unread(tmp_path):
    path = archive(tmp_path / "a.pt", {"x/data.pkl": b"}" * (MAX_PICKLE + 1)})
    with pytest.raises(SourceError, match="at most 4194304"):
        read_torch_file(path)


GOOD = {"x/data.pkl": PROTO + b"}."}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"/etc/data.pkl": b""}, "an absolute or strange name"),
        ({"../data.pkl": b""}, "leaves the archive"),
        ({"x/../../data.pkl": b""}, "leaves the archive"),
        ({"x/y.txt": b""}, "0 members data.pkl"),
        ({"x/data.pkl": b"", "y/data.pkl": b""}, "2 members data.pkl"),
        ({**GOOD, "x/byteorder": b"big"}, "big-endian"),
    ],
)
def test_archives_that_torch_does_not_write(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        read_torch_file(archive(tmp_path / "a.pt", members))


@pytest.mark.slow
def test_a_compressed_bomb_is_not_unpacked(tmp_path):
    bomb = archive(tmp_path / "a.pt", {"x/data.pkl": b"}" * 500_000_000}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1_000_000
    with pytest.raises(SourceError, match="compressed"):
        read_torch_file(bomb)


def test_members_must_be_in_the_file_apart_and_named_once(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(8)}, path)
    whole = path.read_bytes()
    central = whole.index(b"PK\x01\x02")
    claims = bytearray(whole)
    struct.pack_into("<II", claims, central + 20, 1 << 30, 1 << 30)
    path.write_bytes(claims)
    with pytest.raises(SourceError, match="1073741824 bytes at"):
        read_torch_file(path)
    second = whole.index(b"PK\x01\x02", central + 4)
    overlap = bytearray(whole)
    overlap[second + 42 : second + 46] = whole[central + 42 : central + 46]
    path.write_bytes(overlap)
    with pytest.raises(SourceError, match="a local header for"):
        read_torch_file(path)
    path.write_bytes(whole[:-30])
    with pytest.raises(SourceError, match="not a zip archive"):
        read_torch_file(path)


def test_a_bare_pickle_of_old_torch_is_refused_by_name(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match="a bare pickle, as before torch 1.6"):
        read_torch_file(tmp_path / "a.pt")


SMALL = saved({"q": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2).T, "alpha": 4.0}})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255), st.integers(0, 40))
def test_damage_anywhere_ends_in_a_named_error_or_in_the_same_structure(
    tmp_path_factory, at, bit, n
):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    data = bytearray(SMALL)
    data[at] ^= bit
    path.write_bytes(bytes(data[: len(data) - (n if n < 20 else 0)]))
    with suppress(InputError):
        read_torch_file(path)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans(), st.booleans()
)
def test_what_torch_saves_is_read_bit_for_bit(tmp_path_factory, dtype, shape, parameter, ordered):
    path = tmp_path_factory.getbasetemp() / "good.pt"
    torch.manual_seed(len(shape))
    value = (torch.randn(shape) * 9).to(dtype)
    if parameter and dtype.is_floating_point:
        value = torch.nn.Parameter(value)
    saved_value = {"w": value, "n": 3, "x": 0.5, "none": None, "t": (1, [True])}
    if ordered:
        saved_value = torch.nn.Linear(2, 2).state_dict() | saved_value
    torch.save(saved_value, path)
    found = read_torch_file(path)
    assert {k: found[k] for k in ("n", "x", "none", "t")} == {
        "n": 3, "x": 0.5, "none": None, "t": (1, [True]),
    }  # fmt: skip
    read = found["w"].read()
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else ""
    assert read.shape == tuple(value.shape)
    assert read.tobytes() == (raw.tobytes() if value.numel() else b"")


def test_views_are_read_or_refused(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    torch.save({"t": whole.T, "rows": whole[1:3]}, tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    assert np.array_equal(found["t"].read(), whole.T) and found["t"].shape == (6, 4)
    assert np.array_equal(found["t"].rows(1, 3), whole.T[1:3])
    assert np.array_equal(found["rows"].read(), whole[1:3])
    torch.save({"columns": whole[:, 1:3]}, tmp_path / "b.pt")
    with pytest.raises(UnsupportedError, match="strides"):
        read_torch_file(tmp_path / "b.pt")
