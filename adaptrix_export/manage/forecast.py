"""What a build would read, change and write, before it does: `build --dry-run`."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.from_recipe import passes_of
from adaptrix_export.passes.quantize.from_recipe import storage_of
from adaptrix_export.plan import Plan, Tensor
from adaptrix_export.progress import Progress
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.targets import Form
from adaptrix_export.recipe.targets import facts_of as target_facts
from adaptrix_export.recipe.words import ParityLevel
from adaptrix_export.save.staging import refuse_existing
from adaptrix_export.targets import TARGETS

# Rough rates of two cores, from builds of SmolLM2-135M and of a 1.1B shape in bf16.
LIBRARIES_BYTES = 450_000_000  # torch, transformers, peft and ONNX Runtime, imported
MERGE_BYTES = 150_000_000  # of a merge in strips, whatever the model's size
MERGE_RATE = 60e6  # bytes of changed tensors a second
COPY_RATE = 400e6  # bytes of other tensors a second
IMPORT_SECONDS = 8.0  # of the checking process
PROOF_RATE = 60e6  # bytes of the float32 model a second; all cases of level full
FAST_SHARE = 0.5  # of that, with parity fast


@dataclass(frozen=True)
class SourceFile:
    """One file that would be read; `source` is the recipe's name for its model or adapter."""

    source: str
    file: str
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """`changed` maps a module's name to how many of its tensors would change; `passes` are the
    passes in order, none of which was run. Sizes in bytes, times in seconds, both estimates."""

    reads: tuple[SourceFile, ...]
    changed: dict[str, int]
    changed_tensors: int
    tensors: int
    passes: tuple[str, ...]
    target: str
    out: str
    writes_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    parity: str

    @property
    def fits(self) -> bool:
        return self.writes_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "fits": self.fits}


def forecast(recipe: Recipe, opened: Plan, progress: Progress) -> Forecast:
    """The forecast of a plan as it was opened; nothing is merged, calibrated or written.

    Raises OutputError if the output exists, and what the target refuses to hold.
    """
    refuse_existing(recipe.out)
    row = TARGETS[recipe.target]
    if recipe.slots is None:
        row.admit(opened)
    with pass_context(progress) as context:
        steps = passes_of(recipe, opened, context)
    changes = opened.changes()
    modules = Counter(change.site.module for change in changes.values())
    whole, touched = _float32_bytes(opened), sum(_bytes32(c.source) for c in changes.values())
    return Forecast(
        reads=tuple(_reads(opened)),
        changed=dict(sorted(modules.items())),
        changed_tensors=len(changes),
        tensors=len(opened.base.tensors),
        passes=tuple(type(step).__name__ for step in steps),
        target=recipe.target.value,
        out=str(recipe.out),
        writes_bytes=row.estimate(opened, storage_of(recipe, opened)),
        free_bytes=shutil.disk_usage(_existing(recipe.out)).free,
        memory_bytes=_memory(recipe, whole),
        seconds=_seconds(recipe, whole, touched),
        parity=recipe.parity.level.value,
    )


def _reads(plan: Plan) -> Iterator[SourceFile]:
    base = plan.base
    for path in base.files:
        yield SourceFile(base.spec, path.name, path.stat().st_size)
    for adapter in plan.adapters:
        for path in sorted(p for p in adapter.folder.iterdir() if p.name.startswith("adapter_")):
            yield SourceFile(adapter.spec, path.name, path.stat().st_size)


def _bytes32(tensor: Tensor) -> int:
    return 4 * prod(tensor.shape)


def _float32_bytes(plan: Plan) -> int:
    own = (t for name, t in plan.base.tensors.items() if name not in plan.base.tied)
    return sum(map(_bytes32, own))


def _memory(recipe: Recipe, whole: int) -> int:
    """The larger of the merge and the proof, which has the model in float32."""
    if recipe.parity.level is ParityLevel.OFF:
        return LIBRARIES_BYTES + MERGE_BYTES
    copies = 2 if target_facts(recipe.target).form is Form.ADAPTER else 1
    return LIBRARIES_BYTES + MERGE_BYTES + copies * whole


def _seconds(recipe: Recipe, whole: int, touched: int) -> float:
    merge = touched / MERGE_RATE + max(whole - touched, 0) / COPY_RATE
    if recipe.parity.level is ParityLevel.OFF:
        return round(merge, 1)
    share = FAST_SHARE if recipe.parity.level is ParityLevel.FAST else 1.0
    return round(merge + IMPORT_SECONDS + share * whole / PROOF_RATE, 1)


def _existing(out: Path) -> Path:
    """The nearest folder above `out` that is there."""
    place = Path(os.path.abspath(out))
    while not place.is_dir():
        place = place.parent
    return place
