"""Adapters that are not low rank, as the nearest LoRA of a given rank: only where asked for.

The best rank-r approximation of a delta in the Frobenius norm is its truncated singular value
decomposition (Eckart and Young, 1936). It is written as a PEFT folder of its own, so that all that
follows, the proof included, treats it as the adapter that it is; what was lost is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.rewrite.slots import is_plain
from adaptrix_export.load import open_adapter
from adaptrix_export.merge.blocks import base_rows
from adaptrix_export.merge.merge import merged
from adaptrix_export.plan import Adapter, Array, Base, Change, Delta, Plan, Replacement
from adaptrix_export.progress import Progress

ORACLE = ", with {} approximated by SVD"


@dataclass(frozen=True)
class Loss:
    """What an approximation left out: |delta - approximation| / |delta|, Frobenius norms, over all
    sites together and at the worst one. 0 is exact."""

    adapter: str
    rank: int
    error: float
    worst: float
    site: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "error": self.error, "worst": self.worst, "worst_site": self.site
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"adapter {self.adapter} is approximated at rank {self.rank}: {100 * self.error:.2g}% "
            f"of its delta is lost, {100 * self.worst:.2g}% at {self.site}"
        )


@contextmanager
def approximated(
    plan: Plan, rank: int | None, progress: Progress
) -> Iterator[tuple[Plan, tuple[Loss, ...]]]:
    """The plan with LoRA in the place of each adapter that no slot can hold, and what it lost.

    The new adapters' files live as long as the context. Without a `rank` the plan is as it was.
    Raises UnsupportedError for what is no delta of a linear layer's weight.
    """
    odd = [a for a in plan.adapters if not is_plain(a)] if rank is not None else []
    if rank is None or not odd:
        yield plan, ()
        return
    losses: list[Loss] = []
    with TemporaryDirectory(prefix="adaptrix-approximated-") as scratch:
        made: dict[str, Adapter] = {}
        for number, adapter in enumerate(odd):
            folder = Path(scratch) / str(number)
            with progress.stage(f"approximating {adapter.name}"):
                losses.append(_write(plan.base, adapter, rank, folder))
            opened = open_adapter(str(folder), plan.base, adapter.name)
            made[adapter.name] = replace(opened, spec=adapter.spec)
        adapters = tuple(made.get(a.name, a) for a in plan.adapters)
        kept = tuple(a for a in plan.adjustments if a.adapter not in made or a.kind == "dropped")
        yield replace(plan, adapters=adapters, adjustments=kept), tuple(losses)


def told(report: dict[str, Any], losses: tuple[Loss, ...]) -> dict[str, Any]:
    """The report with what was lost, and the oracle by its right name."""
    if not losses:
        return report
    oracle = report["oracle"] + ORACLE.format(", ".join(loss.adapter for loss in losses))
    return {**report, "oracle": oracle, "approximated": {x.adapter: x.as_dict() for x in losses}}


def _write(base: Base, adapter: Adapter, rank: int, folder: Path) -> Loss:
    """A PEFT folder with the nearest LoRA; ranks are smaller where a matrix is."""
    from safetensors.numpy import save_file

    changes = Plan(base, (adapter,)).changes()
    _check(base, adapter)
    tensors: dict[str, Array] = {}
    lost, whole, worst = 0.0, 0.0, (0.0, "")
    ranks: dict[str, int] = {}
    for delta in adapter.deltas:
        path = delta.site.path
        exact = delta_of(changes[delta.name])
        a, b = nearest(exact, rank)
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        ranks[path] = a.shape[0]
        size = float(np.linalg.norm(exact))
        off = float(np.linalg.norm(exact - b.astype(np.float64) @ a.astype(np.float64)))
        lost, whole = lost + off**2, whole + size**2
        worst = max(worst, (off / size if size else 0.0, path))
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "target_modules": sorted(ranks), "rank_pattern": _smaller(ranks, rank),
        "alpha_pattern": _smaller(ranks, rank),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    error = sqrt(lost / whole) if whole else 0.0
    return Loss(adapter.name, rank, float(f"{error:.4g}"), float(f"{worst[0]:.4g}"), worst[1])


def _smaller(ranks: dict[str, int], rank: int) -> dict[str, int]:
    """Ranks, and alphas, that differ: scale stays 1 everywhere."""
    return {path.replace(".", r"\."): r for path, r in ranks.items() if r != rank}


def _check(base: Base, adapter: Adapter) -> None:
    changes: tuple[Replacement | Delta, ...] = (*adapter.replacements, *adapter.deltas)
    for change in changes:
        site, shape = change.site, list[int]()
        if not isinstance(change, Replacement) and change.parameter == "weight":
            name = change.name
            shape = list(base.tensors[base.tied.get(name, name)].shape)
        if len(shape) != 2 or base.architecture.is_embedding(site):
            raise UnsupportedError(
                f"{adapter.name}: {site.path}", "no weight of a linear layer",
                "deltas of such weights, which a slot can approximate",
                "merge this adapter into a graph of its own (target onnx)",
            )  # fmt: skip


def delta_of(change: Change) -> Array:
    """What all terms add to a weight, float64 (outputs, inputs)."""
    exact = merged(change, "F64") - base_rows(change, 0, change.shape[0])
    return exact.T if change.transposed else exact


def nearest(delta: Array, rank: int) -> tuple[Array, Array]:
    """(a, b) in float32 of the nearest b @ a of that rank; each takes the root of the singular
    values. Signs are fixed by the largest entry of each column, so that the bytes are, too."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    rank = min(rank, len(s))
    u, s, vt = u[:, :rank], np.sqrt(s[:rank]), vt[:rank]
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])
    a = (s * signs)[:, None] * vt
    return a.astype(np.float32), (u * (s * signs)).astype(np.float32)
