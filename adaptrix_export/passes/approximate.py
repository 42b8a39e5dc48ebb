"""Adapters that are not low rank, as the nearest LoRA of a given rank: only where asked for.

The best rank-r approximation of a delta in the Frobenius norm is its truncated singular value
decomposition (Eckart and Young, 1936). It is written as a PEFT folder of its own, so that all that
follows, the proof included, treats it as the adapter that it is; what was lost is told.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

import numpy as np

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load import open_adapter
from adaptrix_export.merge.blocks import base_rows
from adaptrix_export.merge.merge import merged
from adaptrix_export.passes.context import PassContext
from adaptrix_export.plan import (
    Adapter,
    ApproximationLoss,
    Array,
    Base,
    Change,
    Delta,
    Plan,
    Replacement,
)


@dataclass(frozen=True)
class Approximate:
    """Pass: LoRA in the place of each adapter that no slot can hold, and what that lost.

    `rank` None leaves the plan as it is, as does a plan of plain LoRA. The new adapters' files lie
    in the pass context. Raises UnsupportedError for what is no delta of a linear layer's weight.
    """

    rank: int | None
    context: PassContext = field(repr=False, compare=False)

    def __call__(self, plan: Plan) -> Plan:
        if self.rank is None:
            return plan
        # imports onnx_ir, and that sympy, which takes longer than all else
        from adaptrix_export.graph.rewrite.slots import is_plain

        others = [a for a in plan.adapters if not is_plain(a)]
        if not others:
            return plan
        losses: list[ApproximationLoss] = []
        made: dict[str, Adapter] = {}
        home = self.context.folder_for("approximated")
        for number, adapter in enumerate(others):
            folder = home / str(number)
            with self.context.progress.stage(f"approximating {adapter.name}"):
                losses.append(_write(plan.base, adapter, self.rank, folder))
            opened = open_adapter(str(folder), plan.base, adapter.name)
            made[adapter.name] = replace(opened, spec=adapter.spec)
        adapters = tuple(made.get(a.name, a) for a in plan.adapters)
        return plan.after(self, adapters=adapters, losses=tuple(losses))


def _write(base: Base, adapter: Adapter, rank: int, folder: Path) -> ApproximationLoss:
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
    return ApproximationLoss(
        adapter.name, rank, float(f"{error:.4g}"), float(f"{worst[0]:.4g}"), worst[1]
    )


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
