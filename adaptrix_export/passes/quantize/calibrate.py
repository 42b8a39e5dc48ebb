"""GPTQ over a whole model, layer by layer: each module sees what the quantized ones before it give.

The model is the merged one: the base's class with the plan's values, of which memory holds what
lies outside of the layers, and one layer. All text goes through a layer at once: when its input
reaches a module, the weight is quantized under the second moments of that input, towards what the
module gives in the float model, which goes through the layer before; and what the module gives from
then on is that of the quantized weight. Nothing here knows of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.load.files.tensors import ByRows
from adaptrix_export.measure.calibration import Calibration, Rows, calibration_rows
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.oracle.layered import ADAPTED, Live
from adaptrix_export.oracle.layerwise import FLOAT, read_layer_by_layer
from adaptrix_export.plan import Array, Base, Change, Plan
from adaptrix_export.precision.blocks import Blocks, Spec, nearest
from adaptrix_export.precision.gptq import Curvature, Problem, aligned, gptq
from adaptrix_export.precision.quantize import Piece, PieceStore
from adaptrix_export.precision.settings import GPTQ, RTN
from adaptrix_export.progress import Progress

BATCH_TOKENS = 1024  # that go through the model's ends at once: logits are wide


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

    def __init__(self, plan: Plan, calibration: Calibration, progress: Progress) -> None:
        self._plan, self._calibration = plan, calibration
        self._progress = progress
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
        run = _Run(live, _by_module(pieces), store, torch.from_numpy(rows.fit))
        with layers_freed(), self._progress.stage("quantizing", len(live.layers), "layers") as done:
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
    """Second moments of the inputs of modules, batch after batch."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1]).float()
            if name not in self.of:
                self.of[name] = torch.zeros(flat.shape[1], flat.shape[1])
            self.of[name].addmm_(flat.T, flat)

        return keep


@dataclass(frozen=True)
class _Inputs:
    """What a module reads: its curvature, and `cross` with what it read in the float model."""

    curvature: Curvature
    cross: torch.Tensor | None


class _Recorded:
    """The first input of each module in the float model."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any) -> None:
            self.of.setdefault(name, args[0])

        return keep


class _Arriving:
    """Calls `quantize` for each module when its first input arrives; what several modules read, one
    after the other, is factored once."""

    def __init__(
        self,
        quantize: Callable[[str, _Inputs], None],
        exact: Mapping[str, torch.Tensor],
    ) -> None:
        self._quantize, self._exact = quantize, exact
        self._done: set[str] = set()
        self._last: tuple[torch.Tensor, torch.Tensor | None, _Inputs] | None = None

    def hook(self, name: str) -> Callable[..., None]:
        def arrived(module: nn.Module, args: Any) -> None:
            if name in self._done:
                return
            self._done.add(name)
            self._quantize(name, self._inputs(args[0], self._exact.get(name)))

        return arrived

    def _inputs(self, values: torch.Tensor, exact: torch.Tensor | None) -> _Inputs:
        if self._last is None or self._last[0] is not values or self._last[1] is not exact:
            flat = values.reshape(-1, values.shape[-1]).float()
            cross = None
            if exact is not None and exact.shape == values.shape:  # experts may read other tokens
                cross = (exact.reshape(flat.shape).float() - flat).T @ flat
            self._last = values, exact, _Inputs(Curvature.of(flat.T @ flat), cross)
        return self._last[2]


class _Run:
    def __init__(
        self,
        live: Live,
        pieces: Mapping[str, list[Piece]],
        store: PieceStore,
        ids: torch.Tensor,
    ) -> None:
        self._live, self._pieces, self._store, self._ids = live, pieces, store, ids
        # what enters the next layer, (rows, tokens, width): now, and in the float model
        self._hidden = self._exact = torch.zeros(0)

    def _batches(self) -> Iterator[slice]:
        step = max(1, BATCH_TOKENS // self._ids.shape[1])
        for start in range(0, len(self._ids), step):
            yield slice(start, start + step)

    def tables(self) -> None:
        """Embeddings: rounded, and what is read from them is what the layers see."""
        for module, own in self._pieces.items():
            if any(piece.is_table for piece in own):
                self._put(module, own, lambda values, piece: nearest(values, piece.spec), RTN)

    def enter(self) -> None:
        self._exact = self._entered()
        self.tables()
        self._hidden = self._entered()

    def _entered(self) -> torch.Tensor:
        batches = [self._live.enter(self._ids[rows], ADAPTED) for rows in self._batches()]
        return torch.cat(batches)

    def layer(self, number: int, path: str) -> None:
        own = [module for module in self._pieces if module.startswith(f"{path}.")]
        assert self._live.reader is not None
        self._live.reader.bring(number)
        recorded = _Recorded()
        with _hooked(self._live, own, recorded.hook), torch.no_grad():
            self._exact = self._live.layer(ADAPTED, number, self._exact)
        arriving = _Arriving(self._quantize, recorded.of)
        with _hooked(self._live, own, arriving.hook), torch.no_grad():
            self._hidden = self._live.layer(ADAPTED, number, self._hidden)

    def head(self) -> None:
        """What reads the last residual: a head of its own, or none."""
        left = {m: p for m, p in self._pieces.items() if any(x.key not in self._store for x in p)}
        if not left:
            return
        moments = _Moments()
        with _hooked(self._live, left, moments.hook), torch.no_grad():
            for rows in self._batches():
                self._live.leave(self._ids[rows], self._hidden[rows], ADAPTED)
        for module, of in moments.of.items():
            self._quantize(module, _Inputs(Curvature.of(of), None))

    def _quantize(self, module: str, inputs: _Inputs) -> None:
        """GPTQ of a module's pieces, in the live model and in the store."""
        by_spec: dict[Spec, list[Piece]] = {}
        for piece in self._pieces[module]:
            by_spec.setdefault(piece.spec, []).append(piece)
        for spec, members in by_spec.items():
            views = [self._view(module, piece) for piece in members]
            weight = torch.from_numpy(np.concatenate(views))
            if inputs.cross is not None:
                weight = aligned(weight, inputs.cross, inputs.curvature)
            blocks = gptq(Problem(weight, inputs.curvature, spec))
            start = 0
            for piece, view in zip(members, views, strict=True):
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
def _hooked(
    live: Live, modules: Iterable[str], hook: Callable[[str], Callable[..., None]]
) -> Iterator[None]:
    """The hook of each module's name, called before the module, inside the block."""
    handles = []
    for name in modules:
        module: nn.Module = live.plain.get_submodule(name)
        handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
