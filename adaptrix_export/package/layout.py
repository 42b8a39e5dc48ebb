"""The places of an artifact's files: `hub`, which every client takes as it is, or `flat`.

hub is `onnx/model.onnx` with `onnx/model.onnx_data`: transformers.js and the hub's downloads look
there and by that name, and optimum, sentence-transformers and onnxruntime-genai (by its `filename`)
find it, too. flat is `model.onnx` with `model.onnx.data`, both in the artifact's own folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import FEATURES
from adaptrix_export.runtime.layout import ONNX_FOLDER
from adaptrix_export.targets.artifact import Artifact

HUB, FLAT = "hub", "flat"
FLAT_DATA, HUB_DATA = ".onnx.data", ".onnx_data"
# sentence-transformers' own optimizer and quantizer copy the graph file alone. A protobuf ends at
# 2 GB; what is not a weight needs room in it, too.
MOST_INLINE = 1_800_000_000


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
    for name in graphs:
        hashes[f"{ONNX_FOLDER}/{name}"] = _move_graph(folder / name, home, renamed, inline)
    if inline:
        for name in renamed.values():
            (home / name).unlink()
            del hashes[f"{ONNX_FOLDER}/{name}"]
    return replace(artifact, hashes=dict(sorted(hashes.items())))


def _move_graph(path: Path, home: Path, renamed: dict[str, str], inline: bool) -> str:
    """Write the graph into `home` with its data by the new name, or inside; returns the sha256."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in _external(model):
        entries = {entry.key: entry for entry in tensor.external_data}
        location = entries["location"].value
        entries["location"].value = renamed.get(location, location)
        if inline:
            _take_in(tensor, home / entries["location"].value, entries)
    data = model.SerializeToString(deterministic=True)
    (home / path.name).write_bytes(data)
    path.unlink()
    return sha256(data).hexdigest()


def _external(model: Any) -> Iterator[Any]:
    """The initializers whose values lie in another file; only a graph's own ones ever do."""
    from onnx import TensorProto

    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _take_in(tensor: Any, path: Path, entries: dict[str, Any]) -> None:
    from onnx import TensorProto

    offset, length = int(entries["offset"].value), int(entries["length"].value)
    with path.open("rb") as file:
        file.seek(offset)
        tensor.raw_data = file.read(length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
