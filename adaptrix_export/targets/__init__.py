"""Lowerings: a plan in, an artifact in a staging folder out; one row a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from threadpoolctl import threadpool_limits

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.files.tensors import itemsize
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.plan import Plan, Tensor
from adaptrix_export.precision.estimate import graph_bytes
from adaptrix_export.precision.settings import FLOAT32, Storage
from adaptrix_export.progress import Progress
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.options import DEFAULTS, LowerOptions
from adaptrix_export.targets.stored import StoredTensors, open_onnx, open_safetensors


class Lower(Protocol):
    def __call__(
        self, plan: Plan, stage: Path, progress: Progress, options: LowerOptions = DEFAULTS
    ) -> Artifact: ...


@dataclass(frozen=True)
class TargetRow:
    """`lower` writes the weight files, of a graph by the front end so named where there is one;
    `estimate` says how many bytes that will take. `stored` reads the weights back for the proof,
    by none of the code that wrote them; None where they are no model's (an adapter's folder)."""

    lower: Lower
    estimate: Callable[[Plan, Storage], int]
    stored: Callable[[Path], StoredTensors] | None
    admit: Callable[[Plan], None] = lambda plan: None  # refuses what the target cannot express


@contextmanager
def _lowering() -> Iterator[None]:
    """What every lowering runs in: tuner layers are freed after it, and BLAS has one thread,
    because the products are thin and its threads would spend more time waiting than working."""
    with layers_freed(), threadpool_limits(limits=1, user_api="blas"):
        yield


def _safetensors(
    plan: Plan, stage: Path, progress: Progress, options: LowerOptions = DEFAULTS
) -> Artifact:
    from adaptrix_export.targets.merged_safetensors import lower_merged_safetensors

    with _lowering():
        return lower_merged_safetensors(plan, stage, progress)


def _onnx(
    plan: Plan, stage: Path, progress: Progress, options: LowerOptions = DEFAULTS
) -> Artifact:
    from adaptrix_export.targets.merged_onnx import lower_merged_onnx

    with _lowering():
        return lower_merged_onnx(
            plan, stage, progress, options.frontend, options.provider, options.trial,
            options.storage.quantization, options.storage.precision,
        )  # fmt: skip


def _switchable(
    plan: Plan, stage: Path, progress: Progress, options: LowerOptions = DEFAULTS
) -> Artifact:
    from adaptrix_export.targets.switchable_onnx import lower_switchable_onnx

    with _lowering():
        return lower_switchable_onnx(
            plan, stage, progress, options.frontend, options.rows, options.provider, options.trial,
            options.storage.quantization, options.storage.precision,
        )  # fmt: skip


def _admit_graph(plan: Plan) -> None:
    """Refuses what no front end draws."""
    base = plan.base
    if base.skeleton is None:
        return
    from adaptrix_export.graph.frontends.traced_whole import pieces_of_base

    if not pieces_of_base(base):
        raise UnsupportedError(
            f"target onnx: {base.skeleton.class_name}", f"a model of type "
            f"{base.architecture.model_type} for {base.task}", "a model that a front end draws",
            "use --target safetensors, and export the merged checkpoint",
        )  # fmt: skip


def _admit_weights(plan: Plan) -> None:
    """Refuses a learned prompt, which is no weight."""
    if plan.prompt is not None:
        kind = next(a.config.get("peft_type") for a in plan.adapters if a.prompt is not None)
        raise UnsupportedError(
            f"adapter with peft_type {kind}", "virtual tokens, and no weights",
            "a graph to put them into", "use --target onnx, or serve it with PEFT",
        )  # fmt: skip


def _admit_slots(plan: Plan) -> None:
    _admit_weights(plan)
    _admit_graph(plan)
    from adaptrix_export.graph.rewrite.slots import check_slots

    check_slots(plan)


def _switchable_bytes(plan: Plan, storage: Storage) -> int:
    """The base, and the adapters with the zeros between their blocks."""
    return graph_bytes(plan.base, storage) + _adapter_bytes(plan)


def _merged_graph_bytes(plan: Plan, storage: Storage) -> int:
    """Untied copies and the factors of gated sites are float32."""
    return graph_bytes(plan.base, storage) + sum(4 * prod(tensor.shape) for tensor in _beside(plan))


def _checkpoint_bytes(plan: Plan, storage: Storage) -> int:
    """All tensors as their base stores them, untied copies included."""
    every = (*plan.base.tensors.values(), *_beside(plan))
    return sum(prod(t.shape) * itemsize(t.dtype) for t in every)


def _beside(plan: Plan) -> list[Tensor]:
    """What is written beside the base's own tensors."""
    shared = [plan.base.tensors[plan.base.tied[name]] for name in plan.untied()]
    return [*shared, *(_gated_factors(plan) if plan.gates else [])]


def _gated_factors(plan: Plan) -> list[Tensor]:
    """What is written beside the weights, because gated sites are not merged."""
    gated = plan.gated()
    deltas = (d for a in plan.adapters for d in a.deltas if d.site in gated)
    return [t for d in deltas for term in d.terms for t in term.tensors]


def _peft(
    plan: Plan, stage: Path, progress: Progress, options: LowerOptions = DEFAULTS
) -> Artifact:
    from adaptrix_export.targets.peft_folder import lower_peft_folder

    return lower_peft_folder(plan, stage, progress)


def _adapter_bytes(plan: Plan, storage: Storage = FLOAT32) -> int:
    """Twice the adapters' values in fp32: several terms may become one."""
    return 8 * sum(adapter.parameters for adapter in plan.adapters)


TARGETS: dict[str, TargetRow] = {
    "peft": TargetRow(_peft, _adapter_bytes, None, _admit_weights),
    "safetensors": TargetRow(_safetensors, _checkpoint_bytes, open_safetensors, _admit_weights),
    "onnx": TargetRow(_onnx, _merged_graph_bytes, open_onnx, _admit_graph),
    "onnx-switchable": TargetRow(_switchable, _switchable_bytes, open_onnx, _admit_slots),
}


def open_stored(target: str, folder: Path) -> StoredTensors:
    """The weights of an artifact, from its bytes."""
    stored = TARGETS[target].stored
    if stored is None:
        raise UnsupportedError(
            f"target {target}", "an artifact without a model's weights", "one with"
        )
    return stored(folder)
