"""Lowerings: a plan in, an artifact in a staging folder out; one row a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from adaptrix_export.load.tensors import itemsize
from adaptrix_export.lower.artifact import Artifact
from adaptrix_export.lower.tuned import layers_freed
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress


@dataclass(frozen=True)
class Lowering:
    """`lower` writes the weight files; `estimate` says how many bytes that will take."""

    lower: Callable[[Plan, Path, Progress], Artifact]
    estimate: Callable[[Plan], int]


def _safetensors(plan: Plan, stage: Path, progress: Progress) -> Artifact:
    from adaptrix_export.lower.merged_safetensors import lower_merged_safetensors

    with layers_freed():
        return lower_merged_safetensors(plan, stage, progress)


def _onnx(plan: Plan, stage: Path, progress: Progress) -> Artifact:
    from adaptrix_export.lower.merged_onnx import lower_merged_onnx

    with layers_freed():
        return lower_merged_onnx(plan, stage, progress)


def _bytes(plan: Plan, width: int | None = None) -> int:
    """Bytes of all tensors at `width` bytes a value, or at their own; untied copies included."""
    tensors = plan.base.tensors
    shared = [tensors[plan.base.tied[name]] for name in plan.untied()]
    return sum(prod(t.shape) * (width or itemsize(t.dtype)) for t in (*tensors.values(), *shared))


LOWERINGS = {
    "safetensors": Lowering(_safetensors, _bytes),
    "onnx": Lowering(_onnx, lambda plan: _bytes(plan, width=4)),
}
