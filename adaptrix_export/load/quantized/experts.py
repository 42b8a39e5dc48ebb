"""Mixtures of experts: views of expert matrices of a checkpoint as transformers' stacked
parameters.

The live model has `mlp.experts.gate_up_proj` (E, 2I, H) and `mlp.experts.down_proj` (E, H, I), and
adapters name those (`target_parameters`). A `Stacked` tensor is one of them and refers to the
stored matrices, so that a checkpoint can be written in its original form. The rows of `FUSIONS`
repeat `transformers.conversion_mapping`, whose import would need torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.tensors import StoredTensor
from adaptrix_export.plan import Array, Tensor


@dataclass(frozen=True)
class Fusion:
    """`parameters`: stacked parameter, in the order of the live module -> matrices of one expert,
    in the order of their rows; empty if the files have it stacked. `turned`: its matrices are
    (in, out)."""

    parameters: Mapping[str, tuple[str, ...]]
    turned: bool = False


_QWEN = Fusion({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
_MIXTRAL = Fusion({"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)})
_STACKED: dict[str, tuple[str, ...]] = {"gate_up_proj": (), "down_proj": ()}
FUSIONS: dict[str, Fusion] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "granitemoe": Fusion(_STACKED),
    "gpt_oss": Fusion(_STACKED, turned=True),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
}
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")


def fusion_of(model_type: str) -> Fusion | None:
    """The row of a type, else one from transformers' conversion rules; None if there are none."""
    if model_type in FUSIONS:
        return FUSIONS[model_type]
    from adaptrix_export.arch.fusions import stacked_parameters

    parameters = stacked_parameters(model_type)
    return Fusion(parameters) if parameters else None


def natural(tensor: StoredTensor) -> list[tuple[int, str]]:
    """Sort key that orders expert 10 after expert 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in tensor.name.split(".")]


@dataclass(frozen=True)
class Stacked:
    """A tensor (experts, rows, columns) of stored matrices: `parts[e]` are expert e's."""

    name: str
    parts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts[0])
        return (len(self.parts), rows, self.parts[0][0].shape[1])

    def read(self) -> Array:
        return self.rows(0, len(self.parts))

    def rows(self, start: int, stop: int) -> Array:
        """Experts `start` to `stop`-1."""
        return np.stack([np.concatenate([p.read() for p in e]) for e in self.parts[start:stop]])

    def pieces(self) -> list[tuple[StoredTensor, int, int, int]]:
        """(stored matrix, expert, first row, last row) of every part."""
        pieces = []
        for expert, parts in enumerate(self.parts):
            row = 0
            for part in parts:
                pieces.append((part, expert, row, row + part.shape[0]))
                row += part.shape[0]
        return pieces


def stack_experts(tensors: Mapping[str, Tensor], model_type: str, place: str) -> dict[str, Tensor]:
    """The tensors under the live model's names, with experts stacked; others unchanged.

    Raises SourceError for experts that are missing or differ in shape or dtype.
    """
    if not any(_EXPERT.match(name) for name in tensors):
        return dict(tensors)
    fusion = fusion_of(model_type)
    if fusion is None:
        return dict(tensors)
    parameter_of = {part: name for name, parts in fusion.parameters.items() for part in parts}
    stacked_tensors: dict[str, Tensor] = {}
    by_parameter: dict[str, dict[tuple[int, str], StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.match(name)
        if match is None or match[3] not in parameter_of or not isinstance(tensor, StoredTensor):
            stacked_tensors[name] = tensor
            continue
        stacked = f"{match[1]}.{parameter_of[match[3]]}"
        stacked_tensors.setdefault(stacked, tensor)  # keeps the place in file order
        by_parameter.setdefault(stacked, {})[int(match[2]), match[3]] = tensor
    for name, matrices in by_parameter.items():
        stacked_tensors[name] = _stack(
            place, name, fusion.parameters[name.rpartition(".")[2]], matrices
        )
    return stacked_tensors


def _stack(
    place: str, name: str, order: tuple[str, ...], matrices: Mapping[tuple[int, str], StoredTensor]
) -> Stacked:
    count = 1 + max(expert for expert, _ in matrices)
    kinds = set()
    for expert in range(count):
        for part in order:
            if (expert, part) not in matrices:
                raise SourceError(
                    f"{place}: {name}", f"no {part} of expert {expert}", f"{count} experts",
                    "fetch the checkpoint again",
                )  # fmt: skip
            matrix = matrices[expert, part]
            kinds.add((part, matrix.dtype, matrix.shape))
    shapes_fit = len(kinds) == len(order) and len({(d, s[1:]) for _, d, s in kinds}) == 1
    if not shapes_fit:
        raise SourceError(
            f"{place}: {name}", "experts of different shapes or dtypes", "all alike",
            "fetch the checkpoint again",
        )  # fmt: skip
    return Stacked(name, tuple(tuple(matrices[e, p] for p in order) for e in range(count)))
