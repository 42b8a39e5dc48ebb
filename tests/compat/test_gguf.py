"""A GGUF file parsed once gives what parsing it each time gives."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from adaptrix_export.compat.gguf import gguf_read_once


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(reader: gguf.GGUFReader) -> dict[str, object]:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields | {tensor.name: tensor.data.tolist() for tensor in reader.tensors}


def test_a_reader_over_a_plain_array_reads_the_same_once(file: Path) -> None:
    own, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    expected = contents(gguf.GGUFReader(file))
    with gguf_read_once():
        reader = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is reader and reader is not gguf.GGUFReader(str(file))
        assert contents(reader) == expected and len(expected) > 6
        assert type(reader.data) is np.ndarray
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert gguf.GGUFReader is own and gguf.get_tensor_name_map is name_map


def test_tensors_outlive_their_reader(file: Path) -> None:
    with gguf_read_once():
        tensor = torch.from_numpy(np.array(gguf.GGUFReader(file).tensors[0].data))
    assert tensor.reshape(-1).tolist() == list(range(96))
