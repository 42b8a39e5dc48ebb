"""Target `safetensors`: the base's checkpoint with the adapters merged in.

Streamed file by file and tensor by tensor: an untouched tensor is copied as bytes, a changed one
is merged in blocks and keeps the base's dtype. Files, names, order and header are the base's own,
except where a tensor has to be added (a head that is tied in the base and no longer is).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression, Reshape, Slice, TensorRef
from adaptrix_export.load.base_model import INDEX, SINGLE
from adaptrix_export.load.files.tensors import (
    FLOATS,
    SafetensorsFile,
    StoredTensor,
    itemsize,
    read_safetensors,
)
from adaptrix_export.load.quantized.experts import Stacked
from adaptrix_export.merge.merge import merged, merged_blocks, plain_blocks
from adaptrix_export.plan import Change, Plan, Tensor
from adaptrix_export.progress import Progress
from adaptrix_export.save.writer import HashingWriter
from adaptrix_export.targets.artifact import Artifact


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file: `source` as it is, or `change` merged."""

    stored_name: str
    name: str
    source: Tensor
    change: Change | None
    # (expert, first row, last row) of a stacked tensor `name` that this stored matrix is
    piece: tuple[int, int, int] | None = None
    new: bool = False  # a head that the base does not have
    in_model: bool = True  # part of the live model, so that the check can compare it

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape if self.change and not self.piece else self.source.shape

    @property
    def expression(self) -> Expression:
        """How this stored tensor follows from the live model's."""
        if self.piece is None:
            return TensorRef(self.name)
        expert, first, last = self.piece
        one = Slice(0, expert, expert + 1, TensorRef(self.name))
        return Reshape(tuple(self.shape), Slice(1, first, last, one))

    @property
    def resized(self) -> bool:
        return self.shape != self.source.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.source.dtype)


@dataclass(frozen=True)
class OutputFile:
    name: str
    entries: tuple[Entry, ...]
    original: SafetensorsFile | None  # whose header is kept if nothing was added


def lower_merged_safetensors(plan: Plan, stage: Path, progress: Progress) -> Artifact:
    """Write the merged checkpoint's weight files into `stage`.

    Raises UnsupportedError for gates that depend on the data.
    """
    for site, gate in plan.gated().items():
        raise UnsupportedError(
            f"context: {site.path}", f"a {gate.mode} gate in a checkpoint", "an onnx target",
            "use --target onnx, or mode blend",
        )  # fmt: skip
    files = plan_files(plan)
    hashes: dict[str, str] = {}
    total = sum(e.nbytes for f in files for e in f.entries)
    with progress.stage("merge", total, "B") as advance:
        for file in files:
            with HashingWriter(stage / file.name) as out:
                out.write(_header(file))
                for entry in file.entries:
                    advance(_write_entry(out, entry))
                hashes[file.name] = out.hexdigest
    if len(files) > 1:
        hashes[INDEX] = _write_index(plan, files, stage)
    return Artifact(
        folder=stage,
        target="safetensors",
        precision="base",
        hashes=hashes,
        weights={
            e.stored_name: e.expression
            for f in files
            for e in f.entries
            if e.in_model and e.source.dtype in FLOATS
        },
        untied=plan.untied(),
        config_changes=config_changes(plan),
        gates=plan.gates,
    )


def plan_files(plan: Plan) -> list[OutputFile]:
    """Which tensor goes where. GGUF bases make one new file; others keep their shards."""
    changes = plan.changes()
    added = _added(plan, changes)
    if plan.base.gguf_file is not None or plan.base.rebuilt:
        entries = [Entry(n, n, t, changes.get(n)) for n, t in plan.base.tensors.items()]
        return [OutputFile(SINGLE, (*entries, *added), None)]
    by_path: dict[Path, list[Entry]] = {path: [] for path in plan.base.files}
    for name, stored in plan.base.tensors.items():
        if isinstance(stored, Stacked):
            for part, *piece in stored.pieces():
                expert, first, last = piece
                entry = Entry(part.name, name, part, changes.get(name), (expert, first, last))
                by_path[part.path].append(entry)
            continue
        assert isinstance(stored, StoredTensor)
        # A head that is stored, but shared by the config, holds values that nobody sees.
        source = _shared(plan, name) if name in plan.untied() else stored
        by_path[stored.path].append(Entry(stored.name, name, source, changes.get(name)))
    for unseen in plan.base.unseen:
        assert isinstance(unseen, StoredTensor)
        by_path[unseen.path].append(Entry(unseen.name, unseen.name, unseen, None, in_model=False))
    files = []
    for path, entries in by_path.items():
        original = read_safetensors(path)
        order = {stored.name: place for place, stored in enumerate(original.tensors)}
        entries.sort(key=lambda e: order[e.stored_name])
        last = path == plan.base.files[-1]
        extra = [e for e in added if _belongs(e, original, last)]
        same = not extra and not any(e.resized for e in entries)
        files.append(OutputFile(path.name, (*entries, *extra), original if same else None))
    return files


def _added(plan: Plan, changes: Mapping[str, Change]) -> list[Entry]:
    """Tensors that the base does not store and that get values of their own."""
    return [
        Entry(name, name, _shared(plan, name), changes.get(name))
        for name in plan.untied()
        if name not in plan.base.tensors
    ] + [Entry(name, name, changes[name].source, changes[name], new=True) for name in plan.added()]


def _belongs(entry: Entry, file: SafetensorsFile, last: bool) -> bool:
    """An added tensor goes beside the one that it was tied to; a new head into the last file."""
    return entry.source in file.tensors or (last and entry.change is not None and entry.new)


def _shared(plan: Plan, name: str) -> Tensor:
    return plan.base.tensors[plan.base.tied[name]]


def _write_entry(out: HashingWriter, entry: Entry) -> int:
    source = entry.source
    if entry.change is not None and entry.piece is not None:
        expert, first, last = entry.piece
        whole = merged(entry.change, source.dtype, expert, expert + 1)
        return out.write_array(whole[0, first:last])
    if entry.change is not None:
        return sum(out.write_array(b) for b in merged_blocks(entry.change, source.dtype))
    if isinstance(source, StoredTensor):
        return out.copy(source.path, source.offset, source.nbytes)
    return sum(out.write_array(b) for b in plain_blocks(source, source.dtype))


def _header(file: OutputFile) -> bytes:
    """The length and header that stand before the values."""
    if file.original is not None:
        return len(file.original.header).to_bytes(8, "little") + file.original.header
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in file.entries:
        header[entry.stored_name] = {
            "dtype": entry.source.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _write_index(plan: Plan, files: list[OutputFile], stage: Path) -> str:
    """The shard index: the base's own bytes unless a tensor was added."""
    original = (plan.base.folder / INDEX).read_bytes()
    if any(file.original is None for file in files):
        index = json.loads(original)
        index["weight_map"] = {e.stored_name: f.name for f in files for e in f.entries}
        index["metadata"]["total_size"] = sum(e.nbytes for f in files for e in f.entries)
        original = json.dumps(index, indent=2, sort_keys=True).encode()
    with HashingWriter(stage / INDEX) as out:
        out.write(original)
        return out.hexdigest
