"""GPTQ over a whole model, layer by layer: each layer sees what the quantized ones before it give.

The model is the merged one: the base's class with the plan's values, of which memory holds what
lies outside of the layers, and one layer. For each layer, one pass over the text collects the
second moments of what goes into its products; its weights are quantized; a second pass with the
quantized weights makes the input of the next layer. Nothing here knows of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.load.files.tensors import ByRows
from adaptrix_export.measure.calibration import Calibration, Rows, calibration_rows
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.oracle.layered import ADAPTED, Live, States
from adaptrix_export.oracle.layerwise import FLOAT, read_layer_by_layer
from adaptrix_export.plan import Array, Base, Change, Plan
from adaptrix_export.precision.blocks import Blocks, nearest
from adaptrix_export.precision.gptq import Problem, gptq
from adaptrix_export.precision.quantize import Piece, PieceStore
from adaptrix_export.precision.settings import GPTQ, RTN
from adaptrix_export.progress import Progress

BATCH_TOKENS = 1024  # that go through a layer at once


@dataclass(frozen=True)
class MergedTensor(ByRows):
    """A tensor of the base as the plan makes it, float32."""

    name: str
    change: Change
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape

    def rows(self, start: int, stop: int) -> Array:
        return merged(self.change, "F32", start, stop)


def merged_base(plan: Plan) -> Base:
    """The base with the plan's values in place of its own."""
    base, untied = plan.base, plan.untied()
    tensors = dict(base.tensors)
    for name in untied:
        tensors.setdefault(name, base.tensors[base.tied[name]])
    for name, change in plan.changes().items():
        tensors[name] = MergedTensor(name, change)
    tied = {name: home for name, home in base.tied.items() if name not in untied}
    config = {**base.config, **config_changes(plan)}
    return replace(base, tensors=tensors, tied=tied, config=config, config_changes={})


class Calibrated:
    """`solve` quantizes by GPTQ what text passes through; what it leaves is rounded to nearest.

    `rows` is the text that it was calibrated on, once that is known.
    """

    def __init__(
        self, plan: Plan, calibration: Calibration, folder: Path, progress: Progress
    ) -> None:
        self._plan, self._calibration = plan, calibration
        self._folder, self._progress = folder, progress
        self.rows: Rows | None = None

    def solve(self, pieces: Sequence[Piece], store: PieceStore) -> None:
        """Quantize the pieces of the first stack of layers, and an untied head."""
        stacks = self._plan.base.architecture.stacks
        if not stacks:
            return
        base = merged_base(self._plan)
        live = _open(base, stacks[0].prefix)
        self.rows = rows = calibration_rows(
            self._calibration, base, live.vocabulary, live.positions, live.generate
        )
        run = _Run(live, _by_module(pieces), store, self._folder, torch.from_numpy(rows.fit))
        with layers_freed(), self._progress.stage("quantizing", len(live.layers), "layers") as done:
            run.tables()
            run.enter()
            for number in range(len(live.layers)):
                run.layer(number, f"{stacks[0].prefix}.{number}")
                done(1)
            run.head()


def _open(base: Base, prefix: str) -> Live:
    inside = [n for n in base.tensors if n.startswith(f"{prefix}.")]
    sizes: dict[str, int] = {}
    for name in inside:
        layer = name.removeprefix(f"{prefix}.").partition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + FLOAT * prod(base.tensors[name].shape)
    rest = sum(FLOAT * prod(t.shape) for n, t in base.tensors.items() if n not in set(inside))
    room = rest + max(sizes.values())
    model, reader = read_layer_by_layer(base, (), prefix, room, torch.device("cpu"))
    return Live(model, prefix, base.task, reader)


def _by_module(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    by_module: dict[str, list[Piece]] = {}
    for piece in pieces:
        module, _, parameter = piece.tensor.rpartition(".")
        if parameter == "weight":
            by_module.setdefault(module, []).append(piece)
    return by_module


class _Moments:
    """Second moments of the inputs of modules; what several read is summed once."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, str] | None = None
        self.shared: dict[str, str] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any) -> None:
            inputs = args[0]
            if self._last is not None and self._last[0] is inputs:
                self.shared[name] = self.shared.get(self._last[1], self._last[1])
                return
            self._last = (inputs, name)
            flat = inputs.reshape(-1, inputs.shape[-1]).float()
            if name not in self.of:
                self.of[name] = torch.zeros(flat.shape[1], flat.shape[1])
            self.of[name].addmm_(flat.T, flat)

        return keep

    def owner(self, name: str) -> str:
        return self.shared.get(name, name)


class _Run:
    def __init__(
        self,
        live: Live,
        pieces: Mapping[str, list[Piece]],
        store: PieceStore,
        folder: Path,
        ids: torch.Tensor,
    ) -> None:
        self._live, self._pieces, self._store, self._ids = live, pieces, store, ids
        self._states = States(folder, "hidden", (*ids.shape, live.width))
        self._step = max(1, BATCH_TOKENS // ids.shape[1])

    def _batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self._ids), self._step):
            yield start, min(start + self._step, len(self._ids))

    def tables(self) -> None:
        """Embeddings: rounded, and what is read from them is what the layers see."""
        for module, own in self._pieces.items():
            if any(piece.is_table for piece in own):
                self._put(module, own, lambda values, piece: nearest(values, piece.spec), RTN)

    def enter(self) -> None:
        for start, stop in self._batches():
            self._states.write(start, self._live.enter(self._ids[start:stop], ADAPTED))

    def layer(self, number: int, path: str) -> None:
        own = {m: p for m, p in self._pieces.items() if m.startswith(f"{path}.")}
        assert self._live.reader is not None
        self._live.reader.bring(number)
        with _watching(self._live, own) as moments:
            self._pass(number, keep=False)
        for names in _together(moments, own):
            self._solve(names, moments.of[moments.owner(names[0])])
        self._pass(number, keep=True)

    def _pass(self, number: int, keep: bool) -> None:
        for start, stop in self._batches():
            with torch.no_grad():
                hidden = self._states.read(start, stop, self._live.device)
                out = self._live.layer(ADAPTED, number, hidden)
            if keep:
                self._states.write(start, out)

    def head(self) -> None:
        """What reads the last residual: a head of its own, or none."""
        left = {m: p for m, p in self._pieces.items() if any(x.key not in self._store for x in p)}
        if not left:
            return
        with _watching(self._live, left) as moments, torch.no_grad():
            for start, stop in self._batches():
                hidden = self._states.read(start, stop, self._live.device)
                self._live.leave(self._ids[start:stop], hidden, ADAPTED)
        for names in _together(moments, left):
            self._solve(names, moments.of[moments.owner(names[0])])

    def _solve(self, modules: Sequence[str], hessian: torch.Tensor) -> None:
        """GPTQ of modules with one input: those of one spec as one problem."""
        by_spec: dict[Any, list[tuple[str, Piece]]] = {}
        for module in modules:
            for piece in self._pieces[module]:
                by_spec.setdefault(piece.spec, []).append((module, piece))
        for spec, members in by_spec.items():
            values = [self._view(module, piece) for module, piece in members]
            weight = torch.from_numpy(np.concatenate(values))
            blocks = gptq(Problem(weight, hessian, spec))
            start = 0
            for (_, piece), view in zip(members, values, strict=True):
                stop = start + len(view)
                part = _rows(blocks, start, stop)
                self._store.put(piece.key, part, GPTQ)
                view[...] = part.dequantized()
                start = stop

    def _put(
        self,
        module: str,
        own: Sequence[Piece],
        make: Callable[[Any, Piece], Blocks],
        method: str,
    ) -> None:
        for piece in own:
            view = self._view(module, piece)
            made = make(np.ascontiguousarray(view), piece)
            self._store.put(piece.key, made, method)
            view[...] = made.dequantized()

    def _view(self, module: str, piece: Piece) -> Any:
        """The piece's values in the live model, to be read and to be written."""
        parameter: Any = self._live.plain.get_submodule(module).weight
        whole = parameter.detach().numpy()
        view = piece.expression.evaluate(lambda name: whole)
        assert np.shares_memory(view, whole), piece.key
        return view


def _rows(blocks: Blocks, start: int, stop: int) -> Blocks:
    zeros = None if blocks.zeros is None else blocks.zeros[start:stop]
    return Blocks(blocks.spec, blocks.codes[start:stop], blocks.scales[start:stop], zeros)


@contextmanager
def _watching(live: Live, modules: Mapping[str, Any]) -> Iterator[_Moments]:
    moments = _Moments()
    handles = []
    for name in modules:
        module: nn.Module = live.plain.get_submodule(name)
        handles.append(module.register_forward_pre_hook(moments.hook(name)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _together(moments: _Moments, modules: Mapping[str, Any]) -> list[list[str]]:
    """Modules in groups that read one input; those that no text came to are left out."""
    groups: dict[str, list[str]] = {}
    for name in modules:
        if moments.owner(name) in moments.of:
            groups.setdefault(moments.owner(name), []).append(name)
    return list(groups.values())
