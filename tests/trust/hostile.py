"""Inputs made to cost: plausible files that took seconds or hundreds of megabytes to refuse.

Each must end at once as a named error, in no more memory than the file has bytes and 100 MB.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.trust.fixtures import rewrite
from tests.trust.malformed import Case, _build, _onnx, _validate, gguf

ROOM = 100 << 20  # bytes beyond the file
PROTO = b"\x80\x02"


def _json(file: str, command: Callable[[Path], list[str]], **fields: Any) -> Callable[..., Any]:
    def make(folder: Path) -> list[str]:
        rewrite(folder / file, lambda old: json.dumps({**json.loads(old), **fields}).encode())
        return command(folder)

    return make


def _written(file: str, content: bytes, command: Callable[[Path], list[str]]) -> Callable[..., Any]:
    def make(folder: Path) -> list[str]:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content)
        return command(folder)

    return make


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def text_value(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


LLAMA = ("general.architecture", 8, text_value("llama"))


def _gguf_base(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "x.gguf").write_bytes(content)
        return ["inspect", str(folder / "x.gguf")]

    return make


def _archive(pickle: bytes, members: int = 0) -> Callable[[Path], list[str]]:
    """An Adaptrix adapter, which is read from a pickle without a question."""

    def make(folder: Path) -> list[str]:
        place = folder / "old"
        place.mkdir()
        facts = {"name": "x", "version": "1", "target_layers": [0], "rank": 4, "alpha": 8,
                 "target_modules": ["self_attn.q_proj"]}  # fmt: skip
        (place / "metadata.json").write_text(json.dumps(facts))
        with zipfile.ZipFile(place / "layer_0.pt", "w", zipfile.ZIP_STORED) as file:
            file.writestr("archive/data.pkl", pickle)
            for number in range(members):
                file.writestr(f"archive/data/{number}", b"")
        return ["validate", str(folder / "base"), str(place)]

    return make


def _layers(**fields: Any) -> Callable[[Path], list[str]]:
    """A type without a row of its own, whose names are read off a model without values."""

    def make(folder: Path) -> list[str]:
        def change(old: bytes) -> bytes:
            return json.dumps({**json.loads(old), "model_type": "opt", **fields}).encode()

        rewrite(folder / "base/config.json", change)
        return _build(folder)

    return make


def _shapes() -> Iterator[Case]:
    many = json.dumps({"a": {"dtype": "F32", "shape": [1] * 160_000, "data_offsets": [0, 4]}})
    names = ", ".join(f'"{n}": 0' for n in range(300_000))
    bombs = {
        "160k dimensions": safetensors(many.encode(), bytes(4)),
        "a list of 10M objects": safetensors(b'{"a": [' + b"{}," * 10_000_000 + b"{}]}"),
        "deep lists": safetensors(b"[" * 20_000_000),
        "300k names and one twice": safetensors(f'{{{names}, "7": 0}}'.encode()),
    }
    for file in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        for name, content in bombs.items():
            yield Case(f"{file}: {name}", _written(file, content, _build))


def _documents() -> Iterator[Case]:
    objects = b'{"a": [' + b"{}," * 9_000_000 + b"{}]}"
    for file in ("base/config.json", "adapter/adapter_config.json", "base/tokenizer.json"):
        command = _build
        yield Case(f"{file}: 9M objects", _written(file, objects, command))
    copied = _written("adapter/tokenizer.json", objects, _build)
    yield Case("adapter/tokenizer.json: 9M objects", copied)
    config = "base/config.json"
    for key in ("num_hidden_layers", "max_position_embeddings", "vocab_size", "head_dim"):
        yield Case(f"{key} 1e12", _json(config, _build, **{key: 10**12}))
    positions = _json(config, _onnx, max_position_embeddings=10**9)
    yield Case("max_position_embeddings 1e9 in a graph", positions)
    yield Case("num_hidden_layers 1e9 of opt", _layers(num_hidden_layers=10**9))
    yield Case("experts 1e9", _layers(text_config={"num_experts": 10**9}))


def _patterns() -> Iterator[Case]:
    config = "adapter/adapter_config.json"
    words = "|".join(f"word{n}" for n in range(20_000))
    slow = {f"(a?){{{n}}}a{{{n}}}|([a-z_.]+)*#{n}": 4 for n in range(20, 2000)}
    for name, fields in {
        "recursive": {"target_modules": "(?R)"}, "20k words": {"target_modules": words},
        "recursive rank": {"rank_pattern": {"(?R)": 4}},
        "words of rank": {"rank_pattern": {words: 4}},
        "2000 slow ones": {"rank_pattern": slow},
        "1M targets": {"target_modules": [f"w{n}" for n in range(1_000_000)]},
        "1M saved": {"modules_to_save": [f"w{n}" for n in range(1_000_000)]},
        "1M excluded": {"exclude_modules": [f"w{n}" for n in range(1_000_000)]},
        "deep replication": {"layer_replication": [[0, 10**12]]},
        "long replication": {"layer_replication": [[0, 2]] * 1_000_000},
    }.items():  # fmt: skip
        for command in (_build, _validate):
            yield Case(f"patterns, {name}: {command.__name__}", _json(config, command, **fields))


def _binaries() -> Iterator[Case]:
    for name, code in {
        "EMPTY_DICT": b"}", "MARK": b"(", "EMPTY_LIST": b"]", "NONE": b"N", "TUPLE1": b"N\x85",
        "BINPUT": b"Nq\x01", "LONG1": b"\x8a\x08" + b"\x7f" * 8, "DUP": b"2",
    }.items():  # fmt: skip
        pickle = PROTO + code * ((4 << 20) // len(code) - 1) + b"."
        yield Case(f"a pickle of {name}", _archive(pickle[: 4 << 20]))
    yield Case("an archive of 200k members", _archive(PROTO + b"}.", 200_000))
    numbers = struct.pack("<IQ", 0, 10_000_000) + bytes(10_000_000)
    nested = struct.pack("<IQ", 9, 800_000) + struct.pack("<IQ", 0, 0) * 800_000
    texts = struct.pack("<IQ", 8, 1_500_000) + bytes(8 * 1_500_000)
    long = struct.pack("<Q", 30_000_000) + b"x" * 30_000_000
    yield Case("gguf: 10 MB of bytes", _gguf_base(gguf(LLAMA, ("x", 9, numbers))))
    yield Case("gguf: lists of nothing", _gguf_base(gguf(LLAMA, ("x", 9, nested))))
    yield Case("gguf: texts of nothing", _gguf_base(gguf(LLAMA, ("x", 9, texts))))
    yield Case("gguf: a long text", _gguf_base(gguf(LLAMA, ("x", 8, long))))
    pairs = (struct.pack("<Q", 0) + struct.pack("<IB", 0, 0)) * 900_000
    yield Case("gguf: 900k pairs", _gguf_base(gguf(count=900_000) + pairs))


def cases() -> list[Case]:
    return [*_shapes(), *_documents(), *_patterns(), *_binaries()]
