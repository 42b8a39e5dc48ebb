"""A checkpoint's tensors under the names of the live model, by transformers' conversion rules.

Used for every model type and task without a `Family` row (`arch/skeleton.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptrix_export.arch.fusions import stacks_of
from adaptrix_export.arch.skeleton import Skeleton
from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import StoredTensor
from adaptrix_export.load.quantized.experts import Stacked, natural
from adaptrix_export.plan import Tensor


@dataclass(frozen=True)
class Named:
    """`tensors` by live name, in file order; `unseen`: tensors that the live model does not have;
    `lacking`: parameters of the live model that the files do not have."""

    tensors: dict[str, Tensor]
    unseen: tuple[Tensor, ...]
    lacking: tuple[str, ...]


def named_by_class(place: str, stored: Iterable[StoredTensor], skeleton: Skeleton) -> Named:
    """Each tensor of the files under its name in the live model.

    Raises UnsupportedError for values that transformers computes while loading, SourceError for
    a tensor of another shape than the class has.
    """
    tensors: dict[str, Tensor] = {}
    unseen: list[Tensor] = []
    pieces: dict[str, dict[str, list[StoredTensor]]] = {}
    for tensor in stored:
        name, pattern = skeleton.live_name(tensor.name)
        if pattern is not None:
            pieces.setdefault(name, {}).setdefault(pattern, []).append(tensor)
            tensors.setdefault(name, tensor)  # keeps the place in file order
        elif name in skeleton.shapes:
            tensors[name] = tensor
        else:
            unseen.append(tensor)
    for name, by_pattern in pieces.items():
        tensors[name] = _stacked(place, name, by_pattern, skeleton)
    for name, value in tensors.items():
        if tuple(value.shape) != skeleton.shapes[name] and name not in _resizable(skeleton):
            raise SourceError(
                f"{place}: {name}", f"shape {list(value.shape)}",
                f"{list(skeleton.shapes[name])} by config.json", "fetch the checkpoint again",
            )  # fmt: skip
    lacking = (
        name for name in skeleton.shapes
        if name not in tensors and name not in skeleton.tied and not skeleton.is_optional(name)
    )  # fmt: skip
    shared = {skeleton.tied[name] for name in skeleton.tied if name in tensors}
    return Named(tensors, tuple(unseen), tuple(name for name in lacking if name not in shared))


def _resizable(skeleton: Skeleton) -> tuple[str, ...]:
    return (f"{skeleton.embedding}.weight", f"{skeleton.head}.weight")


def _stacked(
    place: str, name: str, by_pattern: Mapping[str, list[StoredTensor]], skeleton: Skeleton
) -> Tensor:
    """The experts of one parameter, as transformers stacks them."""
    rule: Any = next(c for c in skeleton.converters if set(by_pattern) & set(c.source_patterns))
    if stacks_of(rule) is None or set(by_pattern) != set(rule.source_patterns):
        raise UnsupportedError(
            f"{place}: {name}", "values that transformers computes while loading ("
            + ", ".join(type(step).__name__ for step in rule.operations) + ")",
            "a type that is stored as it runs", "merge this adapter with PEFT",
        )  # fmt: skip
    columns = [sorted(by_pattern[pattern], key=natural) for pattern in rule.source_patterns]
    if len({len(column) for column in columns}) > 1:
        raise SourceError(
            f"{place}: {name}", "experts with a matrix missing", "all alike",
            "fetch the checkpoint again",
        )  # fmt: skip
    return Stacked(name, tuple(zip(*columns, strict=True)))


def tied_by_class(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied parameter -> the parameter it shares; the latter is the one that the files have."""
    tied: dict[str, str] = {}
    for name, source in skeleton.tied.items():
        if source in tensors:
            tied[name] = source
        elif name in tensors:
            tied[source] = name
    return {name: source for name, source in tied.items() if name != source}
