"""The adapters of a session: read, checked and kept ready to be bound to a graph's slots.

A file is refused before anything runs if it was made for another graph or other weights, if its
bytes are not those that were written, or if a tensor has no slot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, did_you_mean
from adaptrix_export.runtime.files import MANIFEST, ArtifactFiles
from adaptrix_export.runtime.graph import AdapterSlot, DecoderGraph
from adaptrix_export.runtime.stamps import adapter_version

SUFFIX = ".onnx_adapter"
FOLDER = "adapters"  # of an artifact
MIXES = 8  # weighted mixes that are kept ready
Weights = Mapping[str, float]
Factors = Mapping[str, Any]  # input name -> ONNX Runtime value
NOTHING: Factors = MappingProxyType({})

log = logging.getLogger("adaptrix_export.runtime")


@dataclass(frozen=True)
class Loaded:
    """One adapter in memory: `factors` of the slots that it fills, and what it cost."""

    name: str
    factors: Factors
    bytes: int
    rank: int  # the largest of its slots
    seconds: float  # to read and check it


class AdapterStore:
    """Adapters by name, and weighted mixes of them. Safe to use from several threads."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._loaded: dict[str, Loaded] = {}
        self._mixes: OrderedDict[tuple[tuple[str, float], ...], Future[Factors]] = OrderedDict()
        self._mixer = ThreadPoolExecutor(1, "adaptrix-mix")  # its thread starts with the first mix
        self._lock = threading.Lock()

    @property
    def loaded(self) -> Mapping[str, Loaded]:
        return MappingProxyType(dict(self._loaded))

    def load(self, path: Path, name: str) -> Loaded:
        """Read an adapter file; another one of that name is replaced for requests to come.

        Raises SourceError for a file that is damaged, of another graph, or without a slot.
        """
        start = time.perf_counter()
        if not self._graph.slots:
            raise SourceError(
                f"adapter {name}", "a graph without slots for adapters",
                "an artifact of target onnx-switchable",
            )  # fmt: skip
        factors = read_factors(path, self._graph)
        loaded = Loaded(
            name=name,
            factors=self._on_device(factors),
            bytes=sum(int(np.prod(v.shape(), dtype=np.int64)) * 4 for v in factors.values()),
            rank=max((v.shape()[1] for n, v in factors.items() if _is_first(self._graph, n)),
                     default=0),
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        with self._lock:
            self._loaded[name] = loaded
            for key in [key for key in self._mixes if name in dict(key)]:
                del self._mixes[key]
        log.info("adapter %s: %d bytes in %.1f ms", name, loaded.bytes, 1e3 * loaded.seconds)
        return loaded

    def factors(self, weights: Weights) -> Callable[[], Factors]:
        """A function that gives what to bind for a weighted mix; for one adapter at weight 1, what
        its file holds.

        A mix stacks the ranks of its adapters: sum of weight * B A, exactly. That copies all their
        factors, so it begins now, in a thread of its own, and the function waits for it. Raises
        SourceError for an unknown name; the function does so for a mix that is not finite.
        """
        with self._lock:
            missing = [name for name in weights if name not in self._loaded]
            chosen = {name: self._loaded[name] for name in weights if name in self._loaded}
        if missing:
            raise SourceError(
                f"adapter {missing[0]!r}", "not in this session",
                ", ".join(sorted(self._loaded)) or "no adapter at all",
                did_you_mean(missing[0], self._loaded),
            )  # fmt: skip
        if len(weights) == 1 and next(iter(weights.values())) == 1:
            own = next(iter(chosen.values())).factors
            return lambda: own
        key = tuple(sorted(weights.items()))
        with self._lock:
            known = self._mixes.get(key)
            if known is not None and not (
                known.done() and known.exception()
            ):  # or it is tried anew
                self._mixes.move_to_end(key)
                return known.result
            mixed = self._mixer.submit(self._mix, chosen, dict(weights))
            if all(self._loaded[name] is adapter for name, adapter in chosen.items()):
                self._mixes[key] = mixed
                while len(self._mixes) > MIXES:
                    self._mixes.popitem(last=False)
        return mixed.result

    def _mix(self, chosen: Mapping[str, Loaded], weights: Weights) -> Factors:
        start = time.perf_counter()
        mixed = self._on_device(_mixed(self._graph.slots, chosen, weights))
        log.info("mix of %s: %.1f ms", ", ".join(chosen), 1e3 * (time.perf_counter() - start))
        return mixed

    def _on_device(self, factors: Factors) -> Factors:
        """Where the graph runs, so that no run has to bring them there."""
        import onnxruntime

        device = self._graph.provider.device
        if device == "cpu":
            return factors
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        return {name: make(value.numpy(), device, 0) for name, value in factors.items()}


def listed(files: ArtifactFiles) -> dict[str, Path]:
    """Adapter name -> file, as the artifact's manifest says.

    Without a manifest, which a build that is not published yet lacks, the files themselves.
    """
    folder = files.folder
    if not files.manifest:
        return {p.name.removesuffix(SUFFIX): p for p in _files(folder)}
    try:
        entries: dict[str, Any] = files.manifest.get("switchable", {}).get("adapters", {})
        names = {str(name): Path(str(entry["file"])).name for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(
            str(folder / MANIFEST), f"unreadable ({error!r})", "the manifest of a build",
            "build again",
        ) from error  # fmt: skip
    return {name: folder / FOLDER / file for name, file in sorted(names.items())}


def _files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob(f"*{SUFFIX}"))


def read_factors(path: Path, graph: DecoderGraph) -> Factors:
    """The tensors of an adapter file, after every check. Raises SourceError.

    They are copied while the file is open: in ONNX Runtime up to 1.24 at least, a parameter does
    not keep the memory of its file, and what is read from it later is anything, or a crash.
    """
    import onnxruntime

    if not path.is_file():
        raise SourceError(str(path), "no such file", f"an {SUFFIX} file")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        parameters = file.get_parameters().items()
        values: Factors = {name: make(np.array(value.numpy())) for name, value in parameters}
        model, version = file.get_model_version(), file.get_adapter_version()
    except Exception as error:  # ONNX Runtime's errors share no narrower base
        raise SourceError(str(path), f"cannot be read ({error})", "an ONNX adapter") from error
    if model != graph.model_version:
        raise SourceError(
            str(path), f"made for model version {model}", f"{graph.model_version}, as this graph",
            "it belongs to another base or build; add the adapter to this one",
        )  # fmt: skip
    computed = adapter_version({name: value.numpy() for name, value in values.items()})
    if computed != version:
        raise SourceError(
            str(path), f"its values have version {computed}", f"{version} as its header says",
            "the file was changed; build or add the adapter again",
        )  # fmt: skip
    _check_slots(path, values, graph.slots)
    return values


def _check_slots(path: Path, values: Factors, slots: Mapping[str, AdapterSlot]) -> None:
    """Every tensor in a slot, every slot filled by a pair that fits, or not at all."""
    known = {name for slot in slots.values() for name in (slot.a, slot.b)}
    odd = sorted(set(values) - known)
    if odd:
        raise SourceError(
            f"{path}: {odd[0]}", "no slot of that name in the graph", "slots for every tensor"
        )
    for slot in slots.values():
        pair = [values[name].shape() if name in values else None for name in (slot.a, slot.b)]
        if pair == [None, None]:
            continue
        rank = pair[0][1] if pair[0] is not None and len(pair[0]) == 2 else 0
        types = {values[n].data_type() for n in (slot.a, slot.b) if n in values}
        if pair != [[slot.inputs, rank], [rank, slot.outputs]] or types != {"tensor(float)"}:
            raise SourceError(
                f"{path}: {slot.name}", f"{pair} of {', '.join(sorted(types))}",
                f"float ({slot.inputs}, r) and (r, {slot.outputs})",
            )  # fmt: skip


def _is_first(graph: DecoderGraph, name: str) -> bool:
    return any(slot.a == name for slot in graph.slots.values())


def _mixed(
    slots: Mapping[str, AdapterSlot], chosen: Mapping[str, Loaded], weights: Weights
) -> Factors:
    """Factors side by side along the rank, the weight in the second one."""
    import onnxruntime

    make = onnxruntime.OrtValue.ortvalue_from_numpy
    mixed: dict[str, Any] = {}
    for slot in slots.values():
        parts = [
            (loaded.factors[slot.a].numpy(), loaded.factors[slot.b].numpy(), weights[name])
            for name, loaded in chosen.items()
            if slot.a in loaded.factors and weights[name] != 0
        ]
        if parts:
            first = np.concatenate([a for a, _, _ in parts], axis=1)
            with np.errstate(over="ignore"):  # seen below
                second = np.concatenate([b * np.float32(weight) for _, b, weight in parts], axis=0)
            if not np.isfinite(second).all():
                raise SourceError(
                    f"mix of {', '.join(chosen)}", f"values at {slot.b} that are not finite",
                    "finite ones", "use smaller weights",
                )  # fmt: skip
            mixed[slot.a], mixed[slot.b] = make(first), make(second)
    return mixed
