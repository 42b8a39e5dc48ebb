"""Open a checkpoint folder: read the headers of its files and name the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrix_export.arch.architecture import detect
from adaptrix_export.arch.families import FAMILIES, FUSED_ON_DISK, Family, family_of
from adaptrix_export.arch.tasks import (
    FEATURES,
    GENERATION,
    KNOWN_HEADS,
    POOLERS,
    TASKS,
    TOKENS,
    TWO_PARTS,
    choose_task,
    has_row,
)
from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.adapters.adapter_config import adapter_config
from adaptrix_export.load.adapters.folders import adapter_as_base
from adaptrix_export.load.adapters.peft_keys import saved_by
from adaptrix_export.load.config_fields import check_config, check_counts, check_sizes
from adaptrix_export.load.files.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.load.quantized.experts import stack_experts
from adaptrix_export.load.quantized.quantized_base import dequantized
from adaptrix_export.load.source import Source
from adaptrix_export.plan import Base, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def open_checkpoint(source: Source, task: str = "auto", adapters: Iterable[str] = ()) -> Base:
    """Read the headers of a folder with a config.json and safetensors files.

    `adapters` are the specs of the adapters of the build: their configs decide the task if `task`
    is auto.

    Raises SourceError for what is missing or damaged, UnsupportedError for what is refused.
    """
    if error := adapter_as_base(source.spec, source.folder):
        raise error
    config = read_json(source.folder / "config.json")
    check_config(source.spec, config)
    trained = [adapter_config(spec) for spec in adapters]
    task = choose_task(task, config, trained)
    _check_known_layout(source, config)
    if not has_row(config, task):
        return _open_live(source, config, task)
    family = family_of(config.get("model_type"))
    files = weight_files(source)
    stored = [tensor for path in files for tensor in read_safetensors(path).tensors]
    _check_index(source, stored)
    _check_merged(source, stored)
    unseen: tuple[Tensor, ...] = ()
    if task == GENERATION or task in TWO_PARTS:
        named = named_as_in_model(stored, family, config)
    else:
        named, unseen = named_for_task(stored, family, task)
    _check_pooler(source, str(config.get("model_type")), task, named, trained)
    tensors: Mapping[str, Tensor] = named
    quantization: str | None = None
    if config.get("quantization_config"):
        plain = dequantized(source.spec, named, config, family)
        tensors, config, quantization = plain.tensors, dict(plain.config), plain.quantization
    tensors = stack_experts(tensors, str(config.get("model_type")), source.spec)
    base = check_sizes(make_base(source, files, config, tensors, task))
    return replace(base, unseen=unseen, rebuilt=quantization is not None, quantization=quantization)


def _open_live(source: Source, config: Mapping[str, Any], task: str) -> Base:
    """A base whose module names come from its transformers class."""
    from adaptrix_export.arch.skeleton import skeleton_of
    from adaptrix_export.load.live_base import named_by_class, tied_by_class

    files = weight_files(source)
    stored = [tensor for path in files for tensor in read_safetensors(path).tensors]
    _check_index(source, stored)
    _check_merged(source, stored)
    check_counts(source.spec, config, len(stored))
    skeleton = skeleton_of(source.spec, source.folder, config, task)
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{source.spec}: config.json", f"a quantized {skeleton.class_name}", "plain weights",
            "name the unquantized model as the base",
        )  # fmt: skip
    named = named_by_class(source.spec, stored, skeleton)
    return Base(
        spec=source.spec,
        folder=source.folder,
        gguf_file=None,
        files=files,
        config=config,
        tensors=named.tensors,
        architecture=detect(config, named.tensors, source.spec, task, skeleton),
        tied=tied_by_class(skeleton, named.tensors),
        task=task,
        unseen=named.unseen,
        skeleton=skeleton,
        lacking=named.lacking,
    )


def make_base(
    source: Source,
    files: tuple[Path, ...],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    task: str = GENERATION,
) -> Base:
    """The Base for tensors under their names in transformers."""
    architecture = detect(config, tensors, source.spec, task)
    return Base(
        spec=source.spec,
        folder=source.folder,
        gguf_file=source.gguf_file,
        files=files,
        config=config,
        tensors=tensors,
        architecture=architecture,
        tied=_tied(config, architecture.family, tensors)
        if task in (GENERATION, *TWO_PARTS)
        else {},
        task=task,
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


def _check_merged(source: Source, stored: list[StoredTensor]) -> None:
    """Refuse a checkpoint that contains an unmerged adapter."""
    inside = [t.name for t in stored if ".base_layer." in t.name or ".lora_A." in t.name]
    if inside:
        raise SourceError(
            f"{source.spec}: {inside[0]}",
            f"an unmerged model: {len(inside)} tensors of PEFT's layers among its weights",
            "the plain weights of the base", "name the model that the adapter was trained on as "
            "the base; or save this one after merge_and_unload()",
        )  # fmt: skip


def _check_index(source: Source, stored: list[StoredTensor]) -> None:
    """Refuse shards whose tensors are not those that the index lists for them."""
    file_of = {tensor.name: tensor.path.name for tensor in stored}
    if len(file_of) != len(stored):
        raise SourceError(source.spec, "a tensor in two shards", "each tensor once")
    if not (source.folder / INDEX).exists():
        return
    listed = _weight_map(source.folder)
    if listed != file_of:
        name = min(n for n in {*listed, *file_of} if listed.get(n) != file_of.get(n))
        raise SourceError(
            f"{source.spec}: {name}", f"in {file_of.get(name, 'no shard')}",
            f"in {listed.get(name, 'no shard')} by the index", "fetch the checkpoint again",
        )  # fmt: skip


def named_as_in_model(
    stored: list[StoredTensor], family: Family, config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Tensors by their name in the model; each keeps its stored name.

    A checkpoint of the bare model (GPT-2's on the hub) lacks the prefix that the model with a head
    has; it is added here, as transformers does on loading.
    """
    prefix = family.prefix + "."
    bare = not any(tensor.name.startswith(prefix) for tensor in stored)
    prefixed = family.embedding.startswith(prefix)  # T5 has no prefix even so
    add = prefix if bare and prefixed and config.get("model_type") in FAMILIES else ""
    heads = (f"{family.head}.", "final_logits_bias")
    names = ((family.live_name(tensor.name), tensor) for tensor in stored)
    return {name if name.startswith(heads) else add + name: tensor for name, tensor in names}


def _check_known_layout(source: Source, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind in FUSED_ON_DISK:
        raise UnsupportedError(
            f"{source.spec}: model type {kind!r}",
            "q, k and v stored in one tensor that transformers cuts up on loading",
            "a type that is stored as it runs", "merge this adapter with PEFT",
        )  # fmt: skip


def _check_pooler(
    source: Source,
    kind: str,
    task: str,
    tensors: Mapping[str, Tensor],
    adapters: Iterable[Mapping[str, Any]],
) -> None:
    """Refuse a base without the layer that some types have before the classifier, if the adapter
    does not have it either: it was initialised at random in training, and is lost."""
    module = POOLERS.get((kind, task))
    if module is None or f"{module}.weight" in tensors:
        return
    for config in adapters:
        if saved_by(module, config.get("modules_to_save")):
            return
    raise UnsupportedError(
        f"{source.spec}: {task}", f"no {module} in the base", "one",
        "save the base with the one that the adapter was trained with",
    )  # fmt: skip


def named_for_task(
    stored: list[StoredTensor], family: Family, task: str
) -> tuple[dict[str, StoredTensor], tuple[Tensor, ...]]:
    """(tensors by their name in the live model of a task, tensors that this model does not have).

    A checkpoint with a head has the prefix before names of its body, one of the bare model does
    not. The live model has the prefix except for feature extraction.
    """
    prefix = family.prefix + "."
    prefixed = any(tensor.name.startswith(prefix) for tensor in stored)
    tensors: dict[str, StoredTensor] = {}
    unseen: list[Tensor] = []
    for tensor in stored:
        name = family.live_name(tensor.name)
        in_body = name.startswith(prefix)
        if not prefixed:
            in_body = name.partition(".")[0] not in KNOWN_HEADS
        rest = name.removeprefix(prefix) if in_body else name
        head = rest.partition(".")[0]
        if in_body and not (task == TOKENS and head == "pooler"):  # that class has no pooler
            tensors[rest if task == FEATURES else prefix + rest] = tensor
        elif not in_body and head in TASKS[task].heads:
            tensors[rest] = tensor
        else:
            unseen.append(tensor)
    return tensors, tuple(unseen)


def _tied(
    config: Mapping[str, Any], family: Family, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Head and aliases -> embedding, for those that share its weight."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    flag = config.get("tie_word_embeddings", family.tied)
    if embedding not in tensors:
        return {}
    tied = {f"{alias}.weight": embedding for alias in family.aliases}
    if family.aliases:  # T5's flag says how it scales, its files say what it shares
        flag = head not in tensors
    if flag or head not in tensors:
        tied[head] = embedding
    return tied
