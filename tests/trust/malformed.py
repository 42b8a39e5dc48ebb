"""Inputs that are wrong in one place: each must end as a named error, at once.

Every JSON that comes in gets every field of it (and some that could be there) replaced by values of
every type; what is no JSON gets its own list of damages. Commands run in this process, so that a
thousand of them take a minute or two.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.package.documents import ManifestDocument
from adaptrix_export.runtime.files import manifest_text
from tests.trust.fixtures import Inputs, copied, rewrite

LIMIT_S = 5.0
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 1.5, float("nan"), float("inf"), "", "x" * 300, "4", [],
    ["q_proj", 7], [[]], {}, {"a": {"b": []}}, {"1": -1},
)  # fmt: skip

ADAPTER_FIELDS = (
    "alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layer_replication layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_bias lora_dropout modules_to_save peft_type peft_version r "
    "rank_pattern revision target_modules target_parameters task_type trainable_token_indices "
    "use_dora use_rslora"
).split()
BASE_FIELDS = (
    "architectures bos_token_id dtype eos_token_id head_dim hidden_act hidden_size id2label "
    "intermediate_size layer_types max_position_embeddings model_type num_attention_heads "
    "num_hidden_layers num_key_value_heads pad_token_id quantization_config rms_norm_eps "
    "rope_parameters rope_scaling rope_theta sliding_window text_config tie_word_embeddings "
    "torch_dtype vocab_size"
).split()
TOKENIZER_FIELDS = (
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model"
).split()
RECIPE_FIELDS = (
    "base adapters adapter target out frontend task provider precision context compose "
    "redistribute pooling rows slots on_mismatch allow_pickle base_weights adaptrix_scaling"
).split()


@dataclass(frozen=True)
class Case:
    """`make` puts the damage into a folder with `base` and `adapter`, and gives the command."""

    name: str
    make: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `kind` is ok, named, internal or traceback."""

    case: str
    kind: str
    seconds: float
    said: str


def _build(folder: Path) -> list[str]:
    return ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
            "--target", "safetensors", "--parity", "off", "--out", str(folder / "out")]  # fmt: skip


def _validate(folder: Path) -> list[str]:
    return ["validate", str(folder / "base"), str(folder / "adapter")]


def _fields(
    file: str,
    fields: list[str],
    command: Callable[[Path], list[str]],
    wrong: tuple[Any, ...] = WRONG,
) -> Iterator[Case]:
    """Every field of a JSON file with every wrong value; a missing field, too."""
    for field in fields:
        for number, value in enumerate(wrong):

            def make(folder: Path, field: str = field, value: Any = value) -> list[str]:
                def change(content: bytes) -> bytes:
                    return json.dumps({**json.loads(content), field: value}).encode()

                rewrite(folder / file, change)
                return command(folder)

            yield Case(f"{file}: {field}[{number}]", make)


def _bytes(file: str, command: Callable[[Path], list[str]]) -> Iterator[Case]:
    """What may stand in place of a JSON file."""
    damages: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda _: b"", "cut": lambda old: old[: len(old) // 2], "list": lambda _: b"[]",
        "number": lambda _: b"7", "null": lambda _: b"null", "deep": lambda _: b"[" * 100_000,
        "utf-16": lambda old: old.decode("latin-1").encode("utf-16"),
        "latin": lambda _: b'{"a": "\xff"}',
        "mark": lambda old: b"\xef\xbb\xbf" + old, "twice": lambda _: b'{"a": 1, "a": 2}',
        "zeros": lambda old: b"\0" * len(old), "digits": lambda _: b'{"r": ' + b"9" * 5000 + b"}",
    }  # fmt: skip
    for name, change in damages.items():

        def make(folder: Path, change: Callable[[bytes], bytes] = change) -> list[str]:
            rewrite(folder / file, change)
            return command(folder)

        yield Case(f"{file}: {name}", make)


def _places(name: str, command: Callable[[Path], list[str]]) -> Iterator[Case]:
    """Things that are no file of ours in place of an input file or folder."""

    def put(make: Callable[[Path], Any]) -> Callable[[Path], list[str]]:
        def damage(folder: Path) -> list[str]:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            make(path)
            return command(folder)

        return damage

    yield Case(f"{name}: a FIFO", put(os.mkfifo))
    yield Case(f"{name}: /dev/zero", put(lambda path: path.symlink_to("/dev/zero")))
    yield Case(f"{name}: a broken link", put(lambda path: path.symlink_to(path.parent / "none")))
    yield Case(f"{name}: a link to itself", put(lambda path: path.symlink_to(path)))
    yield Case(f"{name}: a folder", put(lambda path: path.mkdir()))
    yield Case(f"{name}: an empty file", put(lambda path: path.touch()))
    yield Case(f"{name}: nothing", put(lambda path: None))


def _headers(file: str) -> Iterator[Case]:
    """A safetensors header of any content over the same bytes."""

    def entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
        def damage(content: bytes) -> bytes:
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            changed = change(header)
            text = json.dumps(header if changed is None else changed).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]

        return damage

    def every(field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
        def change(header: dict[str, Any]) -> None:
            name = next(name for name in header if name != "__metadata__")
            header[name] = {**header[name], field: value}

        return change

    changes: dict[str, Callable[[bytes], bytes]] = {}
    for field in ("dtype", "shape", "data_offsets"):
        for number, value in enumerate(WRONG):
            changes[f"{field}[{number}]"] = entry(every(field, value))
    for number, value in enumerate(WRONG):
        changes[f"metadata[{number}]"] = entry(
            lambda header, value=value: {**header, "__metadata__": value}
        )
        changes[f"metadata field[{number}]"] = entry(
            lambda header, value=value: {**header, "__metadata__": {"adaptrix_export": value}}
        )
        changes[f"entry[{number}]"] = entry(lambda header, value=value: {**header, "odd": value})
    many = [1] * 160_000
    changes["many dimensions"] = entry(every("shape", many))
    changes["a length of 2^63"] = lambda content: struct.pack("<Q", 2**63) + content[8:]
    changes["cut"] = lambda content: content[: len(content) // 2]
    for name, change in changes.items():

        def make(folder: Path, change: Callable[[bytes], bytes] = change) -> list[str]:
            rewrite(folder / file, change)
            return _build(folder)

        yield Case(f"{file}: {name}", make)


def _patterns() -> Iterator[Case]:
    """Regexes of strangers."""
    hostile = {
        "recursive": "(?R)", "nested": "(a*)*b" * 20,
        "words": "|".join(f"w{n}" for n in range(20_000)),
        "unclosed": "(",
        "look": "(?<=a*)b", "huge": "a{1000000}{1000000}", "named": "(?P<a>.)(?P<a>.)",
    }  # fmt: skip
    for name, pattern in hostile.items():
        for field, value in (
            ("target_modules", pattern), ("rank_pattern", {pattern: 4}),
            ("alpha_pattern", {pattern: 4}),
            ("exclude_modules", pattern),
        ):  # fmt: skip

            def make(folder: Path, field: str = field, value: Any = value) -> list[str]:
                def change(content: bytes) -> bytes:
                    return json.dumps({**json.loads(content), field: value}).encode()

                rewrite(folder / "adapter/adapter_config.json", change)
                return _validate(folder)

            yield Case(f"pattern {name} in {field}", make)


def _arguments() -> Iterator[Case]:
    """Paths that are none."""
    for name, path in {
        "no such user": "~nosuchuser/x", "too long": "x" * 5000, "a long part": "/tmp/" + "y" * 300,
        "NUL": "a\0b", "empty": "", "/dev/zero": "/dev/zero", "/dev/null": "/dev/null",
        "a surrogate": "a\udcffb", "hub": "hf:", "package": "package:", "a gguf": "/dev/zero.gguf",
    }.items():  # fmt: skip
        yield Case(f"base {name}", lambda folder, p=path: ["inspect", p])
        yield Case(f"adapter {name}", lambda folder, p=path: ["validate", str(folder / "base"), p])
        yield Case(f"artifact {name}", lambda folder, p=path: ["verify", p])
        yield Case(f"run {name}", lambda folder, p=path: ["run", p, "--prompt", "x"])
        yield Case(f"recipe {name}", lambda folder, p=path: ["build", p])
        yield Case(f"out {name}", lambda folder, p=path: [*_build(folder)[:-1], p])


def _recipes() -> Iterator[Case]:
    for field in RECIPE_FIELDS:
        for number, value in enumerate(WRONG):

            def make(folder: Path, field: str = field, value: Any = value) -> list[str]:
                document = {"base": str(folder / "base"), "adapter": str(folder / "adapter"),
                            "target": "safetensors", "out": str(folder / "out"),
                            "parity": {"level": "off"}, field: value}  # fmt: skip
                path = folder / "recipe.yaml"
                path.write_text(json.dumps(document, indent=1))
                return ["build", str(path)]

            if (field, value) != ("redistribute", {}):  # all defaults: right, and it fits a model
                yield Case(f"recipe: {field}[{number}]", make)


def _run(folder: Path) -> list[str]:
    return ["run", str(folder / "artifact"), "--prompt", "x", "--max-new-tokens", "2", "--no-check"]


def _verify(folder: Path) -> list[str]:
    return ["verify", str(folder / "artifact")]


def _onnx(folder: Path) -> list[str]:
    command = _build(folder)
    command[command.index("safetensors")] = "onnx"
    return [*command, "--frontend", "native"]


def _artifacts() -> Iterator[Case]:
    """A published artifact with wrong fields, under a checksum that is right, and wrong files."""
    manifest = "artifact/manifest.json"
    few = (None, -1, 10**400, "", [], {}, [[]], {"a": {"b": []}})
    for field in ManifestDocument.model_fields:
        for number, value in enumerate(few):
            for command in (_run, _verify):

                def make(
                    folder: Path, field: str = field, value: Any = value,
                    command: Callable[[Path], list[str]] = command,
                ) -> list[str]:  # fmt: skip
                    def change(content: bytes) -> bytes:
                        return manifest_text({**json.loads(content), field: value}).encode()

                    rewrite(folder / manifest, change)
                    return command(folder)

                yield Case(f"{command.__name__} {manifest}: {field}[{number}]", make)
    for name in ("config.json", "generation_config.json", "genai_config.json", "tokenizer.json",
                 "tokenizer_config.json", "manifest.json", "onnx/model.onnx"):  # fmt: skip
        yield from _bytes(f"artifact/{name}", _run)
        yield from _places(f"artifact/{name}", _run)
    yield from _bytes("artifact/onnx/model.onnx_data", _run)
    yield from _places("artifact/onnx/model.onnx_data", _run)
    yield from _places("artifact/onnx", _run)
    yield from _places(manifest, _verify)
    yield from _fields("artifact/config.json", ["architectures", "eos_token_id"], _run)
    yield from _fields("artifact/generation_config.json", ["eos_token_id"], _run)
    yield from _fields("artifact/genai_config.json", ["model", "search"], _run)
    yield from _fields("artifact/tokenizer.json", TOKENIZER_FIELDS, _run)
    yield from _fields("artifact/tokenizer_config.json", ["chat_template", "bos_token"], _chat)


def _chat(folder: Path) -> list[str]:
    return [*_run(folder), "--chat"]


def _tokenizers() -> Iterator[Case]:
    """Tokenizers of a base that becomes a graph, and of an adapter that has its own."""

    def with_own(folder: Path) -> list[str]:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "base" / name, folder / "adapter" / name)
        return _build(folder)

    few = (None, -1, 1.5, "x", [], ["a", 7], {}, {"1": -1})
    for name, fields in (("tokenizer.json", TOKENIZER_FIELDS), ("tokenizer_config.json",
                         ["chat_template", "model_input_names", "tokenizer_class"])):  # fmt: skip
        yield from _fields(f"base/{name}", fields, _onnx, few)
        yield from _fields(f"base/{name}", fields, with_own, few)
    yield from _bytes("base/tokenizer_config.json", _onnx)
    yield from _bytes("base/generation_config.json", _onnx)
    yield from _fields("base/generation_config.json", ["eos_token_id", "pad_token_id"], _onnx, few)


def _gguf() -> Iterator[Case]:
    """Metadata of every type in every field that is read; the file has no tensors."""
    values: dict[str, tuple[int, bytes]] = {
        "u8": (0, b"\x07"), "i32": (5, struct.pack("<i", -5)), "f32": (6, struct.pack("<f", 0.5)),
        "nan": (6, struct.pack("<f", float("nan"))), "bool": (7, b"\1"),
        "u64": (10, struct.pack("<Q", 2**64 - 1)), "f64": (12, struct.pack("<d", 1e300)),
        "text": (8, struct.pack("<Q", 1) + b"x"),
        "no text": (8, struct.pack("<Q", 2) + b"\xff\xfe"),
        "list": (9, struct.pack("<IQ", 5, 1) + struct.pack("<i", 3)),
        "empty list": (9, struct.pack("<IQ", 8, 0)), "unknown": (13, b""),
    }  # fmt: skip
    sizes = ("context_length", "block_count", "feed_forward_length", "embedding_length",
             "attention.head_count", "attention.head_count_kv", "attention.key_length")  # fmt: skip
    right = {f"llama.{name}": (4, struct.pack("<I", 4)) for name in sizes}
    right |= {
        "general.architecture": (8, struct.pack("<Q", 5) + b"llama"),
        "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5)),
        "llama.rope.freq_base": (6, struct.pack("<f", 1e4)),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 1) + b"a"),
    }
    more = ("general.type", "general.alignment", "split.count", "llama.rope.scaling.type",
            "adapter.type", "adapter.lora.alpha", "tokenizer.ggml.bos_token_id")  # fmt: skip
    for field in (*right, *more):
        for name, value in values.items():

            def make(
                folder: Path, field: str = field, value: tuple[int, bytes] = value
            ) -> list[str]:
                pairs = [(key, *stored) for key, stored in {**right, field: value}.items()]
                (folder / "x.gguf").write_bytes(gguf(*pairs))
                if field.startswith("adapter"):
                    return ["validate", str(folder / "base"), str(folder / "x.gguf")]
                return ["inspect", str(folder / "x.gguf")]

            yield Case(f"gguf {field}: {name}", make)


def gguf(*pairs: tuple[str, int, bytes], tensors: int = 0, count: int | None = None) -> bytes:
    """A GGUF header of these pairs (key, type, value as it is stored)."""
    text = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs) if count is None else count)
    for key, kind, value in pairs:
        text += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    return text


def artifact_cases() -> list[Case]:
    """Those that need `Inputs.artifact`, of target onnx."""
    return list(_artifacts())


def cases() -> list[Case]:
    adapter, base = "adapter/adapter_config.json", "base/config.json"
    return [
        *_fields(adapter, ADAPTER_FIELDS, _build),
        *_fields(base, BASE_FIELDS, _build),
        *_bytes(adapter, _build), *_bytes(base, _build),
        *_bytes("base/generation_config.json", _build),
        *_bytes("base/tokenizer_config.json", _build),
        *_headers("adapter/adapter_model.safetensors"), *_headers("base/model.safetensors"),
        *_places(adapter, _build), *_places(base, _build),
        *_places("adapter/adapter_model.safetensors", _build),
        *_places("base/model.safetensors", _build), *_places("base/tokenizer.json", _build),
        *_places("base", _build), *_places("adapter", _build),
        *_patterns(), *_arguments(), *_recipes(), *_tokenizers(), *_gguf(),
    ]  # fmt: skip


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Outputs of relative paths land in `folder`, and go with it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def play(case: Case, inputs: Inputs, folder: Path) -> Outcome:
    """Run one case in a copy of the inputs."""
    copied(inputs.base, folder / "base")
    copied(inputs.adapter, folder / "adapter")
    if inputs.artifact is not None:
        copied(inputs.artifact, folder / "artifact")
    try:
        command = case.make(folder)
        start = time.perf_counter()
        with chdir(folder):
            done = CliRunner().invoke(main, command)
        seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        kind, said = "traceback", repr(done.exception)
    elif "internal error" in said or done.exit_code not in (0, 1, 2):
        kind = "internal"
    else:
        kind = "ok" if done.exit_code == 0 else "named"
    return Outcome(case.name, kind, seconds, said)
