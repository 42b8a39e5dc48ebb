"""safetensors headers: what the library writes is read, what is damaged is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import read_safetensors

TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_reads_what_the_library_writes(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    values = {n: torch.randint(0, 2, s).to(TORCH[d]) for n, (d, s) in entries.items()}
    save_file(values, path)
    read = {t.name: t for t in read_safetensors(path).tensors}
    assert read.keys() == values.keys()
    for name, tensor in read.items():
        expected = values[name]
        assert tensor.shape == tuple(expected.shape) and tensor.dtype == entries[name][0]
        assert np.array_equal(tensor.read().astype(np.float64), expected.to(torch.float64).numpy())


def test_rows_are_slices_of_the_whole(tmp_path):
    values = torch.randn(10, 3, 2)
    save_file({"x": values}, tmp_path / "x.safetensors")
    (tensor,) = read_safetensors(tmp_path / "x.safetensors").tensors
    assert np.array_equal(tensor.rows(4, 9), values[4:9].numpy())


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: object = (1,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": lambda p: p.write_bytes(b""),
    "header longer than the file": lambda p: write(p, {}, length=1 << 60),
    "not JSON": lambda p: write(p, b"{"),
    "a list": lambda p: write(p, []),
    "deep": lambda p: write(p, b"[" * 100_000),
    "duplicate": lambda p: write(
        p, b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"
    ),
    "cut short": lambda p: write(p, {"x": entry(0, 4)}, b"abc"),
    "a tail": lambda p: write(p, {"x": entry(0, 4)}, b"abcde"),
    "gap": lambda p: write(p, {"x": entry(0, 4), "y": entry(8, 12)}, b"a" * 12),
    "overlap": lambda p: write(p, {"x": entry(0, 4), "y": entry(2, 6)}, b"a" * 6),
    "wrong size": lambda p: write(p, {"x": entry(0, 8)}, b"a" * 8),
    "negative": lambda p: write(p, {"x": entry(0, 4, (-1,))}, b"a" * 4),
    "a shape of strings": lambda p: write(p, {"x": entry(0, 4, ("1",))}, b"a" * 4),
    "no offsets": lambda p: write(p, {"x": {"dtype": "F32", "shape": [1]}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    DAMAGED[kind](path)
    with pytest.raises(SourceError, match="bad.safetensors"):
        read_safetensors(path)


def test_unknown_dtype_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry(0, 1, (2,), "F4")}, b"a")
    with pytest.raises(UnsupportedError, match="dtype F4"):
        read_safetensors(path)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_named_error_or_a_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    try:
        assert read_safetensors(path).tensors == ()
    except (SourceError, UnsupportedError) as error:
        assert "x.safetensors" in str(error)
