"""A file written and hashed by a thread: its bytes, its hash, and errors of the disk."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

from adaptrix_export.save import writer
from adaptrix_export.save.writer import HashingWriter


@pytest.mark.parametrize("room", [1, 1000, writer.AHEAD])
def test_bytes_positions_and_hash(tmp_path, monkeypatch, room):
    monkeypatch.setattr(writer, "AHEAD", room)
    monkeypatch.setattr(writer, "FLUSHED", 500)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20)
    turned = np.arange(300, dtype=np.float32).reshape(20, 15).T
    with HashingWriter(tmp_path / "out") as out:
        out.write(b"head")
        out.align(64)
        assert out.position == 64
        assert out.write_array(turned) == 1200
        assert out.copy(source, 100, 4000) == 4000
        out.write(b"")
        digest = out.hexdigest
        out.write(b"tail")
        whole = out.hexdigest
    expected = b"head" + bytes(60) + turned.copy().tobytes() + source.read_bytes()[100:4100]
    assert (tmp_path / "out").read_bytes() == expected + b"tail"
    assert digest == hashlib.sha256(expected).hexdigest()
    assert whole == hashlib.sha256(expected + b"tail").hexdigest()


def write_to_a_full_disk(path):
    with HashingWriter(path) as out, open("/dev/full", "wb", buffering=0) as full:
        out._file.close()
        out._file = full
        out.write(b"x" * 100)
        assert out.hexdigest


def test_an_error_of_the_disk_reaches_the_caller(tmp_path):
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write_to_a_full_disk(tmp_path / "out")
    assert threading.active_count() == before


def fail_while_writing(path):
    with HashingWriter(path) as out:
        out.write(bytes(1 << 20))
        raise KeyError("of the caller")


def test_an_error_of_the_caller_ends_the_thread(tmp_path):
    before = threading.active_count()
    with pytest.raises(KeyError, match="of the caller"):
        fail_while_writing(tmp_path / "out")
    assert threading.active_count() == before
