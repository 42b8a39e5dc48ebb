"""The tensors of a PEFT folder: in one file, in shards with an index, or in a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdapterError, SourceError
from adaptrix_export.load.adapters.folders import PICKLED, WEIGHTS, WEIGHTS_INDEX
from adaptrix_export.load.files.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.load.files.torch_file import read_torch_file
from adaptrix_export.load.files.views import FileTensor, Transposed, renamed
from adaptrix_export.load.reading import Reading

OURS = "adaptrix_export"  # our own key in the metadata of a safetensors file


@dataclass(frozen=True)
class StoredWeights:
    """The files of an adapter, their tensors, and this package's metadata in them.

    `usual`: it is the one file that PEFT reads.
    """

    files: tuple[Path, ...]
    tensors: tuple[FileTensor, ...]
    metadata: dict[str, Any]
    usual: bool
    notes: tuple[str, ...] = ()


def stored_weights(place: str, folder: Path, reading: Reading) -> StoredWeights:
    """Read the headers; no weight is read.

    Raises SourceError for missing or damaged files, AdapterError for tensors without values.
    """
    weights = _read_headers(place, folder, reading)
    check_gathered(place, weights.tensors)
    return weights


def _read_headers(place: str, folder: Path, reading: Reading) -> StoredWeights:
    path = folder / WEIGHTS
    if path.is_file():
        file = read_safetensors(path)
        beside = (f"{PICKLED} beside {WEIGHTS} is not read, as PEFT does not read it",)
        notes = beside if (folder / PICKLED).is_file() else ()
        metadata = _own_metadata(file.metadata.get(OURS))
        return StoredWeights((path,), file.tensors, metadata, True, notes)
    if (folder / WEIGHTS_INDEX).is_file():
        return _sharded(place, folder)
    path = folder / PICKLED
    if not path.is_file():
        raise SourceError(place, "no weights", WEIGHTS, "save it with safe_serialization=True")
    if not reading.allow_pickle:
        raise SourceError(
            place, f"only {PICKLED}, a pickle", WEIGHTS,
            "save it with safe_serialization=True, or allow it with --allow-pickle",
        )  # fmt: skip
    return StoredWeights((path,), _pickled(place, path), {}, False)


def _sharded(place: str, folder: Path) -> StoredWeights:
    """All shards that the index names; they must have exactly the tensors that it lists."""
    listed = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SourceError(f"{place}: {WEIGHTS_INDEX}", "no weight_map", "tensor name -> file")
    tensors: list[FileTensor] = []
    files = []
    for shard in sorted({str(name) for name in listed.values()}):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise SourceError(
                f"{place}: {WEIGHTS_INDEX}", f"no shard {shard!r}", "every shard in the folder",
                "fetch the adapter again",
            )  # fmt: skip
        files.append(folder / shard)
        tensors += read_safetensors(folder / shard).tensors
    stored_names = {tensor.name for tensor in tensors}
    if stored_names != set(listed) or len(stored_names) != len(tensors):
        name = min((stored_names ^ set(listed)) or stored_names)
        raise SourceError(
            f"{place}: {name}", "index and shards disagree on it", "each tensor in one shard",
            "fetch the adapter again",
        )  # fmt: skip
    note = f"{len(files)} shards by {WEIGHTS_INDEX}, which PEFT does not read"
    return StoredWeights(tuple(files), tuple(tensors), {}, False, (note,))


def _pickled(place: str, path: Path) -> tuple[FileTensor, ...]:
    saved = read_torch_file(path)
    if not isinstance(saved, dict):
        raise SourceError(f"{place}: {PICKLED}", "no dict", "tensor name -> tensor")
    tensors: list[FileTensor] = []
    for name, tensor in saved.items():
        if not isinstance(name, str) or not isinstance(tensor, (StoredTensor, Transposed)):
            raise SourceError(f"{place}: {PICKLED}", f"no tensor at {str(name)[:80]!r}", "tensors")
        tensors.append(renamed(tensor, name))
    return tuple(tensors)


def _own_metadata(text: str | None) -> dict[str, Any]:
    """The JSON that this package writes into a file's metadata; other text there is ignored."""
    try:
        metadata = json.loads(text or "null")
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def check_gathered(place: str, tensors: Iterable[FileTensor]) -> None:
    """Raise AdapterError for tensors that DeepSpeed ZeRO-3 saved without their values."""
    tensors = tuple(tensors)
    empty = [tensor for tensor in tensors if 0 in tensor.shape]
    if empty:
        raise AdapterError(
            f"{place}: {empty[0].name}",
            f"shape {list(empty[0].shape)}, like {len(empty) - 1} more of {len(tensors)} tensors: "
            "saved under DeepSpeed ZeRO-3 without gathering them",
            "the values", "save with stage3_gather_16bit_weights_on_model_save, or "
            "model.save_pretrained(state_dict=accelerator.get_state_dict(model)); or run "
            "zero_to_fp32.py on the checkpoint",
        )  # fmt: skip
