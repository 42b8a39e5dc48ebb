"""Artifacts are read back with suspicion."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from adaptrix_export.errors import ParityError
from adaptrix_export.targets import open_stored
from adaptrix_export.targets.stored import inside


def raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_in_every_float_format(tmp_path: Path) -> None:
    made = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "c": np.array(3.0, np.float32),
        "d": np.zeros((0, 4), np.float32),
        "e": np.arange(3).astype(ml_dtypes.bfloat16),
    }
    save_file(made, tmp_path / "model.safetensors")
    stored = open_stored("safetensors", tmp_path)
    assert list(stored.names()) == sorted(made)
    for name, values in made.items():
        assert stored.read(name).dtype == values.dtype
        np.testing.assert_array_equal(stored.read(name), values)


def test_shards_must_hold_what_the_index_says(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    assert list(open_stored("safetensors", tmp_path).names()) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": places | {"b": "one.safetensors"}}))
    with pytest.raises(ParityError, match="'b' is in the file or the index"):
        open_stored("safetensors", tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": ENTRY | {"shape": [3]}}, "bytes 0 to 8"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "bytes 4 to 12"),
        ({"a": ENTRY | {"dtype": "F4"}}, "dtype F4"),
        (b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), "occurs twice"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, said: str) -> None:
    raw(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(ParityError, match=said):
        open_stored("safetensors", tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8])
def test_a_truncated_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ParityError, match="a whole safetensors file"):
        open_stored("safetensors", tmp_path)


def graph(folder: Path, location: str, length: int = 8) -> None:
    """A graph of one initializer whose values lie in `location`."""
    outer = ir.ExternalTensor(location, 0, length, ir.DataType.FLOAT, shape=ir.Shape([2]), name="w")
    value = ir.Value(name="w", shape=outer.shape, type=ir.TensorType(outer.dtype))
    value.const_value = outer
    model = ir.Model(
        ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10
    )
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())


def test_onnx_external_data_stays_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    values = np.array([1.5, -2.5], np.float32)
    for place in (folder, tmp_path):
        (place / "data").write_bytes(values.tobytes())
    graph(folder, "data")
    np.testing.assert_array_equal(open_stored("onnx", folder).read("w"), values)
    graph(folder, "../data")
    with pytest.raises(ParityError, match="inside its folder"):
        open_stored("onnx", folder)
    (folder / "link").symlink_to(tmp_path / "data")
    graph(folder, "link")
    with pytest.raises(ParityError, match="missing or a link"):
        open_stored("onnx", folder)
    graph(folder, "data", length=4)
    with pytest.raises(ParityError, match="8 bytes within 8"):
        open_stored("onnx", folder)


def test_a_linked_folder_inside_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").write_bytes(b"x")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ParityError, match="resolves outside"):
        inside(tmp_path / "artifact", "sub/data")
