"""The places of an artifact's files: `hub`, which every client takes as it is, or `flat`.

hub is `onnx/model.onnx` with `onnx/model.onnx_data`: transformers.js and the hub's downloads look
there and by that name, and optimum, sentence-transformers and onnxruntime-genai (by its `filename`)
find it, too. Of a model in parts, such as an encoder and a decoder, every graph has a data file of
its own name, as transformers.js asks for; what two parts share is then stored twice. flat is
`model.onnx` with `model.onnx.data`, both in the artifact's own folder, shared by all graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import FEATURES
from adaptrix_export.runtime.layout import ONNX_FOLDER
from adaptrix_export.save.writer import HashingWriter
from adaptrix_export.targets.artifact import Artifact

HUB, FLAT = "hub", "flat"
FLAT_DATA, HUB_DATA = ".onnx.data", ".onnx_data"
# sentence-transformers' own optimizer and quantizer copy the graph file alone. A protobuf ends at
# 2 GB; what is not a weight needs room in it, too.
MOST_INLINE = 1_800_000_000
WHOLE = "model.onnx"  # a graph of this name is the whole model; others beside it share its data
ALIGNMENT = 4096  # a page, so that ONNX Runtime can map each initializer


def laid_out(artifact: Artifact, layout: str, task: str) -> Artifact:
    """The artifact with its graphs where `layout` says, in place; other targets stay as they are.

    An encoder of features becomes one file without external data, where that is possible.
    """
    folder = artifact.folder
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    if layout == FLAT or not graphs:
        return artifact
    home = folder / ONNX_FOLDER
    home.mkdir()
    renamed: dict[str, str] = {}
    for path in sorted(folder.glob(f"*{FLAT_DATA}")):
        renamed[path.name] = path.name.removesuffix(FLAT_DATA) + HUB_DATA
        path.rename(home / renamed[path.name])
    hashes = {
        f"{ONNX_FOLDER}/{renamed[name]}" if name in renamed else name: digest
        for name, digest in artifact.hashes.items()
        if name not in graphs
    }
    size = sum((home / name).stat().st_size for name in renamed.values())
    inline = task == FEATURES and size <= MOST_INLINE
    apart = WHOLE not in graphs and not inline
    for name in graphs:
        model = _renamed(folder / name, renamed)
        if inline:
            for tensor in _external(model):
                _take_in(tensor, home)
        elif apart:
            hashes |= _own_data(model, home, f"{Path(name).stem}{HUB_DATA}")
        hashes[f"{ONNX_FOLDER}/{name}"] = _write_graph(model, home / name)
        (folder / name).unlink()
    if inline or apart:
        for name in renamed.values():
            (home / name).unlink()
            del hashes[f"{ONNX_FOLDER}/{name}"]
    return replace(artifact, hashes=dict(sorted(hashes.items())))


def _renamed(path: Path, renamed: dict[str, str]) -> Any:
    """The graph of a file, its initializers in the data files by their new names."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in _external(model):
        entry = _entries(tensor)["location"]
        entry.value = renamed.get(entry.value, entry.value)
    return model


def _write_graph(model: Any, path: Path) -> str:
    """Returns the sha256."""
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return sha256(data).hexdigest()


def _own_data(model: Any, home: Path, name: str) -> dict[str, str]:
    """Copy the graph's initializers into a file of its own; its sha256 by its place, if any."""
    tensors = list(_external(model))
    if not tensors:
        return {}
    with HashingWriter(home / name) as out:
        for tensor in tensors:
            entries = _entries(tensor)
            out.align(ALIGNMENT)
            start, length = out.position, int(entries["length"].value)
            out.copy(home / entries["location"].value, int(entries["offset"].value), length)
            entries["location"].value, entries["offset"].value = name, str(start)
        return {f"{ONNX_FOLDER}/{name}": out.hexdigest}


def _entries(tensor: Any) -> dict[str, Any]:
    return {entry.key: entry for entry in tensor.external_data}


def _external(model: Any) -> Iterator[Any]:
    """The initializers whose values lie in another file; only a graph's own ones ever do."""
    from onnx import TensorProto

    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _take_in(tensor: Any, home: Path) -> None:
    """Put an initializer's values into the graph itself."""
    from onnx import TensorProto

    entries = _entries(tensor)
    with (home / entries["location"].value).open("rb") as file:
        file.seek(int(entries["offset"].value))
        tensor.raw_data = file.read(int(entries["length"].value))
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
