"""Quantizes the weights of graphs: which ones, each piece by its method, and what is put in place.

Pieces are quantized one after another and kept in a scratch folder, so that memory holds one of
them; the graphs' initializers read them from there when the data file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Array, Plan
from adaptrix_export.precision.blocks import Blocks, Spec, nearest, stacked
from adaptrix_export.precision.nbits import Stored, Weight, put_blocks, weights_of
from adaptrix_export.precision.packing import packed_codes, packed_zeros
from adaptrix_export.precision.settings import LOSSLESS, Quantization
from adaptrix_export.precision.stored import stored_spec
from adaptrix_export.progress import Progress

Read = Callable[[Expression], Array]


@dataclass(frozen=True)
class Piece:
    """What is quantized at once: (n, k), usually the weight of one module."""

    expression: Expression
    spec: Spec
    shape: tuple[int, int]
    is_table: bool  # looked up by rows, too

    @property
    def tensor(self) -> str:
        return next(self.expression.names())

    @property
    def key(self) -> str:
        return repr(self.expression)


class PieceStore:
    """Quantized pieces in a folder, by the expression that they are made from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._specs: dict[str, Spec] = {}
        self.methods: dict[str, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def put(self, key: str, blocks: Blocks, method: str) -> None:
        path = self._folder / f"piece-{len(self._files)}.npz"
        parts: dict[str, Any] = {"codes": blocks.codes, "scales": blocks.scales}
        parts |= {
            name: values
            for name, values in (("zeros", blocks.zeros), ("shifts", blocks.shifts))
            if values is not None
        }
        np.savez(path, **parts)
        self._files[key], self._specs[key], self.methods[key] = path, blocks.spec, method

    def get(self, key: str) -> Blocks:
        with np.load(self._files[key], allow_pickle=False) as parts:
            zeros, shifts = parts.get("zeros"), parts.get("shifts")
            return Blocks(self._specs[key], parts["codes"], parts["scales"], zeros, shifts)


@dataclass(frozen=True)
class Quantized:
    """Graphs whose weights are stored in blocks.

    `entries`: name of the float initializer that was replaced -> its manifest entry;
    `kept_float`: name of a matrix that stays float -> the reason.
    """

    graphs: Mapping[str, Graph]
    entries: Mapping[str, Mapping[str, Any]]
    kept_float: Mapping[str, str]


@dataclass(frozen=True)
class Chosen:
    """A weight that is to be quantized."""

    weight: Weight
    spec: Spec
    pieces: tuple[Piece, ...]


Solve = Callable[[Sequence[Piece], PieceStore], None]  # quantizes what text is needed for


def quantize(
    graphs: Mapping[str, Graph],
    plan: Plan,
    read: Read,
    settings: Quantization,
    folder: Path,
    progress: Progress,
    solve: Solve | None = None,
) -> Quantized:
    """Quantize the weights that the graphs read through products and lookups.

    `read` gives the values of an expression, float32; `solve` quantizes as many pieces as it can
    by a better method; all others are rounded to nearest. Raises UnsupportedError where there is
    nothing to quantize.
    """
    store = PieceStore(folder)
    chosen, floats = _choose(graphs, plan, settings)
    if not chosen:
        raise UnsupportedError(
            plan.base.spec, f"no weight that can have {settings.bits} bits",
            "products with a weight", "use precision fp32",
        )  # fmt: skip
    each = {p.key: p for c in chosen.values() for p in c.pieces}
    if solve is not None:
        solve(list(each.values()), store)
    left = [piece for piece in each.values() if piece.key not in store]
    if left:
        with progress.stage("rounding weights", len(left), "tensors") as advance:
            for piece in left:
                store.put(piece.key, nearest(read(piece.expression), piece.spec), "rtn")
                advance(1)
    entries: dict[str, dict[str, Any]] = {}
    initializers: dict[str, Stored] = {}
    for name, one in chosen.items():
        initializers[name], entries[name] = _stored(store, one, settings)
    rewritten = {}
    for file, graph in graphs.items():
        weights = {weight.name: weight for weight in weights_of(graph, _known(plan))[0]}
        for name, one in chosen.items():
            if name in weights:
                put_blocks(graph.model, weights[name], one.spec, initializers[name])
        graph.model.graph.sort()
        rewritten[file] = replace(
            graph, weights={n: e for n, e in graph.weights.items() if n not in chosen}
        )
    return Quantized(rewritten, entries, floats)


def _known(plan: Plan) -> Callable[[str], bool]:
    tensors = {*plan.base.tensors, *plan.base.tied, *plan.changes()}
    return tensors.__contains__


def _choose(
    graphs: Mapping[str, Graph], plan: Plan, settings: Quantization
) -> tuple[dict[str, Chosen], dict[str, str]]:
    chosen: dict[str, Chosen] = {}
    floats: dict[str, str] = {}
    for graph in graphs.values():
        weights, unfit = weights_of(graph, _known(plan))
        floats |= unfit
        for weight in weights:
            if weight.name in chosen or weight.name in floats:
                continue
            spec = _spec(plan, weight, settings)
            if isinstance(spec, str):
                floats[weight.name] = spec
            else:
                chosen[weight.name] = Chosen(weight, spec, _pieces(plan, weight, spec))
    for name in [n for n in chosen if n in floats]:  # in another graph it is read otherwise
        del chosen[name]
    return chosen, floats


def _spec(plan: Plan, weight: Weight, settings: Quantization) -> Spec | str:
    modules = {piece.module for piece in weight.expression.stacked()}
    if any(map(settings.keeps_float, modules)):
        return "as asked for"
    if settings.method == LOSSLESS:
        return stored_spec(plan, weight)
    embedding = plan.base.architecture.family.embedding
    if modules & {embedding, "lm_head"}:
        if settings.embedding is None:
            return "as asked for"
        bits = settings.embedding
    elif weight.is_table:
        return "a small table"
    else:
        bits = max(map(settings.bits_of, modules))
    spec = settings.spec(bits, weight.shape[1], whole=weight.is_table)
    return spec or f"{weight.shape[1]} columns, which no block fits"


def _pieces(plan: Plan, weight: Weight, spec: Spec) -> tuple[Piece, ...]:
    result = []
    for expression in weight.expression.stacked():
        rows = _rows(plan, expression, weight)
        result.append(Piece(expression, spec, (rows, weight.shape[1]), weight.is_table))
    return tuple(result)


def _rows(plan: Plan, expression: Expression, weight: Weight) -> int:
    """Rows of a piece: known from its tensor, or of the weight if it has but one."""
    if len(weight.expression.stacked()) == 1:
        return weight.shape[0]

    def shape_of(tensor: str) -> tuple[int, ...]:
        change = plan.changes().get(tensor)
        home = plan.base.tied.get(tensor, tensor)
        return change.shape if change is not None else plan.base.tensors[home].shape

    return expression.shape(shape_of)[0]


def _stored(
    store: PieceStore, one: Chosen, settings: Quantization
) -> tuple[Stored, dict[str, Any]]:
    """The initializers of a weight, read when they are written, and its entry."""
    keys = [piece.key for piece in one.pieces]

    def whole() -> Blocks:
        return stacked([store.get(key) for key in keys])

    blocks, spec = whole(), one.spec
    scale_type = ir.DataType.FLOAT16 if settings.fp16_scales else ir.DataType.FLOAT
    zeros = packed_zeros(blocks)
    stored = Stored(
        _lazy(lambda: packed_codes(whole()), ir.DataType.UINT8, packed_codes(blocks).shape),
        _lazy(
            lambda: whole().scales.astype(np.float16 if settings.fp16_scales else np.float32),
            scale_type,
            blocks.scales.shape,
        ),
        None if zeros is None else ir.tensor(zeros),
        # (blocks, n), as a product reads it
        None if blocks.shifts is None else ir.tensor(np.ascontiguousarray(blocks.shifts.T)),
    )
    entry = {
        "expression": one.weight.expression.as_json(),
        "shape": list(one.weight.shape),
        "bits": spec.bits,
        "block": spec.block,
        "symmetric": spec.symmetric,
        "shifted": spec.shifted,
        "methods": [store.methods[key] for key in keys],
        "sha256": blocks.digest(),
        "bytes": spec.nbytes(*one.weight.shape),
    }
    return stored, entry


def _lazy(make: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.tensor(make()), dtype=dtype, shape=ir.Shape(shape))
