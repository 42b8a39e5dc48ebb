"""Open a base model: find its files, read their headers, name its tensors, know its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.architecture import FAMILIES, USUAL, Family, detect
from adaptrix_export.load.quantized_base import dequantized
from adaptrix_export.load.source import Source, resolve
from adaptrix_export.load.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.plan import Base, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def open_base(spec: str) -> Base:
    """Read the headers of the base that `spec` names (see `source.py` for the forms).

    Raises SourceError for what is missing or damaged, UnsupportedError for what is refused.
    """
    source = resolve(spec)
    if source.gguf_file is not None:
        from adaptrix_export.load.gguf_base import open_gguf

        return open_gguf(source, source.gguf_file)
    config = read_json(source.folder / "config.json")
    family = FAMILIES.get(str(config.get("model_type")), USUAL)
    files = weight_files(source)
    stored = [tensor for path in files for tensor in read_safetensors(path).tensors]
    _check_index(source, stored)
    tensors = named_as_in_model(stored, family, config)
    if not config.get("quantization_config"):
        return make_base(source, files, config, tensors)
    found = dequantized(spec, tensors, config, family)
    base = make_base(source, files, found.config, found.tensors)
    return replace(base, rebuilt=True, quantization=found.quantization)


def make_base(
    source: Source,
    files: tuple[Path, ...],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Base:
    """Put a Base together once its tensors have the names that transformers gives them."""
    architecture = detect(config, tensors, source.spec)
    return Base(
        spec=source.spec,
        folder=source.folder,
        gguf_file=source.gguf_file,
        files=files,
        config=config,
        tensors=tensors,
        architecture=architecture,
        tied=_tied(config, architecture.family, tensors),
    )


def weight_files(source: Source) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint folder, shards in the order of their names."""
    folder = source.folder
    if (folder / INDEX).exists():
        shards = sorted({str(name) for name in _weight_map(folder).values()})
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise SourceError(
                    f"{source.spec}: {INDEX}", f"no shard {shard!r}", "every shard in the folder",
                    "fetch the checkpoint again",
                )  # fmt: skip
        return tuple(folder / shard for shard in shards)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    pickled = next((name for name in PICKLES if (folder / name).exists()), None)
    if pickled:
        raise UnsupportedError(
            source.spec, f"only {pickled}", SINGLE,
            "a pickle can run code; save the model with safe_serialization=True",
        )  # fmt: skip
    raise SourceError(source.spec, "no weights", f"{SINGLE} or {INDEX}", "check the folder")


def _weight_map(folder: Path) -> dict[str, Any]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(INDEX, "no weight_map", "tensor name -> file")
    return weight_map


def _check_index(source: Source, stored: list[StoredTensor]) -> None:
    """Index and shards must tell of the same tensors in the same files."""
    found = {tensor.name: tensor.path.name for tensor in stored}
    if len(found) != len(stored):
        raise SourceError(source.spec, "a tensor in two shards", "each tensor once")
    if not (source.folder / INDEX).exists():
        return
    listed = _weight_map(source.folder)
    if listed != found:
        name = min(n for n in {*listed, *found} if listed.get(n) != found.get(n))
        raise SourceError(
            f"{source.spec}: {name}", f"in {found.get(name, 'no shard')}",
            f"in {listed.get(name, 'no shard')} by the index", "fetch the checkpoint again",
        )  # fmt: skip


def named_as_in_model(
    stored: list[StoredTensor], family: Family, config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Tensors by their name in the model; each keeps its stored name.

    A checkpoint of the bare model (GPT-2's on the hub) leaves out the prefix that the model
    with a head has; transformers adds it on loading, and so do we.
    """
    prefix = family.prefix + "."
    bare = not any(tensor.name.startswith(prefix) for tensor in stored)
    add = prefix if bare and config.get("model_type") in FAMILIES else ""
    heads = (f"{family.head}.",)
    return {
        tensor.name if tensor.name.startswith(heads) else add + tensor.name: tensor
        for tensor in stored
    }


def _tied(
    config: Mapping[str, Any], family: Family, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Head -> embedding where the model shares them."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    flag = config.get("tie_word_embeddings", family.tied)
    if embedding in tensors and (flag or head not in tensors):
        return {head: embedding}
    return {}
