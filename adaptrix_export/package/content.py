"""The files beside the weights: configs, tokenizer, chat template, genai_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adaptrix_export.arch.tasks import FEATURES
from adaptrix_export.arch.tasks import GENERATION as GENERATES
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.tokenizer_files import PROCESSOR_FILES, TOKENIZER, TOKENIZER_CONFIG
from adaptrix_export.package.browser import browser_config
from adaptrix_export.package.genai import GRAPH, genai_config, token_ids
from adaptrix_export.package.model_config import portable_config
from adaptrix_export.package.sentence import copy_sentence_files
from adaptrix_export.package.tokenizer import tokenizer_files
from adaptrix_export.package.tokenizer_config import make_tokenizer_portable
from adaptrix_export.recipe.targets import Form, facts_of
from adaptrix_export.runtime.layout import located

if TYPE_CHECKING:
    from adaptrix_export.plan import Base, Plan
    from adaptrix_export.targets.artifact import Artifact

CONFIG = "config.json"
GENERATION = "generation_config.json"
GENAI = "genai_config.json"


# Precision as recipes name it -> dtype as config.json does. An integer artifact computes in fp32.
DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
    "int4": "float32",
}

# Keys of a fresh tokenizer_config.json that say how it was loaded, not what it is.
_LOADING_KEYS = ("backend", "is_local", "local_files_only", "name_or_path")
_CONFIG_PATH_KEYS = ("_name_or_path", "name_or_path")


def write_package(
    artifact: Artifact, plan: Plan, tokenizer: Path | None = None, portable: bool = False
) -> None:
    """Write everything a runtime needs beside the weights in `artifact.folder`.

    safetensors: config.json as in the base, byte for byte unless the merge changed keys of it;
    with `portable` one that transformers 4 and 5 read alike.
    onnx: a config.json that transformers 4 and 5 read alike, and genai_config.json where the
    graph is a decoder. Tokenizer and processor files are the base's own, or those in the folder
    `tokenizer`; a GGUF base has them made from its metadata. A sentence encoder keeps the modules
    that sentence-transformers puts behind it.
    """
    stage, base = artifact.folder, plan.base
    form = facts_of(artifact.target).form
    if form is Form.ADAPTER:
        return  # an adapter's folder has no model in it
    is_graph = form is Form.GRAPH
    if base.gguf_file is not None and tokenizer is None:
        _tokenizer_from_gguf(base, stage)
    else:
        _copy(base, tokenizer, stage)
        if base.task == FEATURES:
            copy_sentence_files(base.folder, stage)
        if is_graph:
            _complete_tokenizer(tokenizer or base.folder, stage)
    if is_graph or portable:
        make_tokenizer_portable(stage, decoder=base.task == GENERATES)
    if is_graph or base.gguf_file is not None:
        _write_generation(stage, base.config)
    _write_config(artifact, base, is_graph, portable)
    graph = located(stage, GRAPH)
    if is_graph and graph.exists() and plan.prompt is None:  # genai sizes a cache by its tokens
        genai = genai_config(stage, graph, _read(stage / CONFIG), _read(stage / GENERATION))
        if genai is not None:
            _write(stage / GENAI, genai)


def _copy(base: Base, tokenizer: Path | None, stage: Path) -> None:
    """All of one tokenizer's files, never of two; the processor's are the base's where the other
    folder has none."""
    files = {path.name: path for path in tokenizer_files(tokenizer or base.folder)}
    if base.gguf_file is None:
        names = (*PROCESSOR_FILES, GENERATION)
        files = {
            name: base.folder / name for name in names if (base.folder / name).is_file()
        } | files
    for name, path in sorted(files.items()):
        # Through links: the hub cache is a folder of links into a store of blobs.
        shutil.copyfile(path, stage / name)


def _write_config(artifact: Artifact, base: Base, is_graph: bool, portable: bool) -> None:
    path = artifact.folder / CONFIG
    if is_graph or base.gguf_file is not None:
        dtype = DTYPES.get(artifact.precision)
        config = portable_config(base.config, dtype) | dict(artifact.config_changes)
        config |= browser_config(artifact.folder)
        if base.gguf_file is not None:
            config = {k: v for k, v in config.items() if k not in _CONFIG_PATH_KEYS}
        _write(path, config)
    elif portable:
        _write(path, portable_config(base.config) | dict(artifact.config_changes))
    elif artifact.config_changes or base.rebuilt:
        # base.config: what the file says, but for a quantization that the weights have left
        _write(path, dict(base.config) | dict(artifact.config_changes))
    else:
        shutil.copyfile(base.folder / CONFIG, path)


def _write_generation(stage: Path, config: Mapping[str, Any]) -> None:
    """A generation_config.json for a base without one: where to start, stop and pad."""
    path = stage / GENERATION
    if path.exists():
        return
    ids = token_ids(config, {})
    eos = ids.pop("eos_token_id")
    if eos:
        ids["eos_token_id"] = eos if len(eos) > 1 else eos[0]  # as transformers writes it
    _write(path, ids)


def _tokenizer_from_gguf(base: Base, stage: Path) -> None:
    """Tokenizer files from GGUF metadata, the same bytes wherever the file lies.

    `AutoTokenizer` would make the same tokenizer after parsing the file a second time, slowly.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base.folder, gguf_file=base.gguf_file)
    tokenizer.save_pretrained(stage)
    path = stage / TOKENIZER_CONFIG
    config = {k: v for k, v in _read(path).items() if k not in _LOADING_KEYS}
    # transformers 4 does not know the name that 5 writes, TokenizersBackend.
    _write(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _complete_tokenizer(folder: Path, stage: Path) -> None:
    """Add tokenizer.json, which ONNX runtimes read, where a base has only its older forms."""
    older = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if (stage / TOKENIZER).exists() or not any((stage / name).exists() for name in older):
        return
    from transformers import AutoTokenizer

    with TemporaryDirectory(dir=stage) as scratch:
        AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
        converted = Path(scratch, TOKENIZER)
        if converted.exists():
            shutil.copyfile(converted, stage / TOKENIZER)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
