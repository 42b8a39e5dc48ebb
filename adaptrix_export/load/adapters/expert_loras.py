"""LoRAs of single experts' Linears (transformers 4), on parameters that stack the experts (5).

`mlp.experts.3.gate_proj` is rows 0 to I - 1 of expert 3 in `mlp.experts.gate_up_proj`. The factors
of all experts become one pair in PEFT's layout for a parameter (`plan.Experts`): for each expert
the A of its parts are concatenated along the rank, and B is block-diagonal. The product is the
same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.parameters import Parts, RankAndScale
from adaptrix_export.load.files.tensors import DTYPES
from adaptrix_export.load.quantized.experts import fusion_of
from adaptrix_export.plan import Array, Base, Delta, Experts, Tensor

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Block:
    """The factors of one part of one expert: a (r, in), b (rows, r), from row `start` of the
    expert's matrix on."""

    a: Tensor
    b: Tensor
    start: int


@dataclass(frozen=True)
class StackedA:
    """(experts * rank, in), the expert slowest; `rank` is the sum of its parts' ranks."""

    name: str
    experts: tuple[tuple[Block | None, ...], ...]
    ranks: tuple[int, ...]  # of each part
    inputs: int
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts) * sum(self.ranks), self.inputs)

    def read(self) -> Array:
        width: np.dtype[Any] = DTYPES[self.dtype]
        rows = [
            np.zeros((rank, self.inputs), width) if block is None else _padded(block.a, rank)
            for blocks in self.experts
            for block, rank in zip(blocks, self.ranks, strict=True)
        ]
        return np.concatenate(rows)

    def rows(self, start: int, stop: int) -> Array:
        return self.read()[start:stop]


@dataclass(frozen=True)
class StackedB:
    """(outputs, rank * experts), the expert fastest; zeros where a part has no rows."""

    name: str
    experts: tuple[tuple[Block | None, ...], ...]
    ranks: tuple[int, ...]
    outputs: int
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outputs, sum(self.ranks) * len(self.experts))

    def read(self) -> Array:
        values = np.zeros((self.outputs, sum(self.ranks), len(self.experts)), DTYPES[self.dtype])
        for expert, blocks in enumerate(self.experts):
            first = 0
            for block, rank in zip(blocks, self.ranks, strict=True):
                if block is not None:
                    rows = slice(block.start, block.start + block.b.shape[0])
                    values[rows, first : first + block.b.shape[1], expert] = block.b.read()
                first += rank
        return values.reshape(self.outputs, -1)

    def rows(self, start: int, stop: int) -> Array:
        return self.read()[start:stop]


def _padded(a: Tensor, rank: int) -> Array:
    values = a.read()
    missing = rank - values.shape[0]
    return np.pad(values, ((0, missing), (0, 0))) if missing else values


def take_experts(
    place: str,
    config: Mapping[str, Any],
    base: Base,
    parts: Mapping[str, Parts],
    rank_and_scale: RankAndScale,
) -> tuple[list[Delta], dict[str, Parts], tuple[str, ...]]:
    """(deltas of stacked parameters, the other entries of `parts`, a note if there are deltas).

    Raises AdapterError for an expert that the base does not have, UnsupportedError for anything but
    plain LoRA, and for scales that differ between experts.
    """
    by_module: dict[str, dict[tuple[int, str], Parts]] = {}
    left: dict[str, Parts] = {}
    for path, tensors in parts.items():
        module = _stacked_module(base, path)
        if module is None or not {"a", "b"} & set(tensors):
            left[path] = tensors
        else:
            expert, part = path.rsplit(".", 2)[1:]
            by_module.setdefault(module, {})[int(expert), part] = tensors
    deltas = []
    for module, experts in by_module.items():
        deltas += _deltas(place, config, base, module, experts, rank_and_scale)
    count = sum(len(experts) for experts in by_module.values())
    note = f"{count} LoRAs of single experts are read onto the stacked parameters of this base"
    return deltas, left, ((note,) if count else ())


def _stacked_module(base: Base, path: str) -> str | None:
    """The module whose parameters stack the experts that `path` is one part of."""
    match = _EXPERT.match(path)
    fusion = fusion_of(base.architecture.model_type) if match else None
    if match is None or fusion is None:
        return None
    module = base.architecture.family.live_name(f"{match[1]}.").removesuffix(".")
    stacked = any(f"{module}.{name}" in base.tensors for name in fusion.parameters)
    known = {part for names in fusion.parameters.values() for part in names}
    return module if stacked and match[3] in known else None


def _deltas(
    place: str,
    config: Mapping[str, Any],
    base: Base,
    module: str,
    by_expert: Mapping[tuple[int, str], Parts],
    rank_and_scale: RankAndScale,
) -> list[Delta]:
    fusion = fusion_of(base.architecture.model_type)
    assert fusion is not None
    deltas = []
    for parameter, names in fusion.parameters.items():
        mine = {key: tensors for key, tensors in by_expert.items() if key[1] in names}
        if not mine:
            continue
        stored = base.tensors[f"{module}.{parameter}"]
        experts, outputs, inputs = stored.shape
        beyond = next((expert for expert, _ in mine if expert >= experts), None)
        if beyond is not None:
            raise AdapterError(
                f"{place}: {module}.{beyond}", f"expert {beyond}", f"{experts} experts in the base",
                "was this adapter trained on another model?",
            )  # fmt: skip
        height = outputs // len(names)
        blocks: list[list[Block | None]] = [[None] * len(names) for _ in range(experts)]
        scales = set()
        for (expert, part), tensors in mine.items():
            path = f"{module}.{expert}.{part}"
            a, b, scale = _factors(place, path, config, tensors, rank_and_scale, (height, inputs))
            scales.add(scale)
            where = names.index(part)
            blocks[expert][where] = Block(a, b, where * height)
        if len(scales) > 1:
            raise UnsupportedError(
                f"{place}: {module}.{parameter}", f"scales {sorted(scales)} of its experts",
                "one scale", "merge this adapter with PEFT and build the merged model",
            )  # fmt: skip
        term = _term(f"{module}.{parameter}", blocks, scales.pop(), outputs, inputs)
        deltas.append(Delta(base.architecture.site_of(module), (term,), parameter))
    return deltas


def _factors(
    place: str,
    path: str,
    config: Mapping[str, Any],
    tensors: Parts,
    rank_and_scale: RankAndScale,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor, float]:
    if set(tensors) != {"a", "b"}:
        raise UnsupportedError(
            f"{place}: {path}", f"parts {', '.join(sorted(tensors))}", "lora_A and lora_B alone",
            "merge this adapter with PEFT and build the merged model",
        )  # fmt: skip
    rank, scale = rank_and_scale(place, path, config)
    a, b = tensors["a"], tensors["b"]
    expected = ((rank, shape[1]), (shape[0], rank))
    if (a.shape, b.shape) != expected:
        raise AdapterError(
            f"{place}: {path}", f"factors of shape {list(a.shape)} and {list(b.shape)}",
            f"{list(expected[0])} and {list(expected[1])}",
            "was this adapter trained on another model?",
        )  # fmt: skip
    return a, b, scale


def _term(
    name: str, blocks: list[list[Block | None]], scale: float, outputs: int, inputs: int
) -> Experts:
    ranks = tuple(
        max((row[i].a.shape[0] for row in blocks if row[i] is not None), default=0)  # type: ignore[union-attr]
        for i in range(len(blocks[0]))
    )
    every = [block for row in blocks for block in row if block is not None]
    dtypes = {tensor.dtype for block in every for tensor in (block.a, block.b)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    experts = tuple(map(tuple, blocks))
    a = StackedA(f"{name}.lora_A", experts, ranks, inputs, dtype)
    b = StackedB(f"{name}.lora_B", experts, ranks, outputs, dtype)
    return Experts(a, b, scale, len(blocks))
