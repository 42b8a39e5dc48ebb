"""PEFT folders for the oracle, where it cannot be given the adapter's own.

Stock PEFT loads neither a transposed factor nor a fused projection on a split base, and it must not
load what `on_mismatch: drop` took out. Such an adapter is written anew as PEFT folders that say
what was built; ranks, alphas and rsLoRA stay the config's, so that PEFT does its own scaling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.plan import Adapter, Base, Delta, Plan, Tensor
from adaptrix_export.save.peft_folder import peft_folders, peft_tensors
from adaptrix_export.save.safetensors_file import write_safetensors

_NO_TARGET = "dummy-target-modules"  # what PEFT calls an adapter without any
_MOVES = ("renamed", "split", "stacked")

Folders = tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class OracleFolders:
    """(name, folder) of every adapter for stock PEFT, and the names of those that were converted
    to its form from another."""

    adapters: Folders
    converted: tuple[str, ...] = ()


@contextmanager
def oracle_folders(plan: Plan) -> Iterator[OracleFolders]:
    """Folders for the oracle: an adapter's own where PEFT can read it; else written anew, in
    PEFT's form or as adjusted.

    The folders live as long as the context. `plan` is the one before any pass.
    """
    kinds = {
        a.name: {n.kind for n in plan.adjustments if n.adapter == a.name} for a in plan.adapters
    }
    plain = replace(plan, adapters=tuple(a for a in plan.adapters if not kinds[a.name]))
    with (
        peft_folders(plain) as converted,
        scratch_folder("adapters") as scratch,
    ):
        own = dict(converted.adapters)
        folders: list[tuple[str, Path]] = []
        for number, adapter in enumerate(plan.adapters):
            if adapter.name in own:
                folders.append((adapter.name, own[adapter.name]))
                continue
            patterns = bool(kinds[adapter.name] & set(_MOVES))
            for part in range(_parts(adapter)):
                folder = scratch / f"{number}-{part}"
                write_folder(plan.base, adapter, folder, part, patterns)
                folders.append((adapter.name, folder))
        yield OracleFolders(tuple(folders), converted.converted)


def _parts(adapter: Adapter) -> int:
    """Folders that it takes: a PEFT adapter has one term a site, and PEFT adds adapters up."""
    return max((len(delta.terms) for delta in adapter.deltas), default=1)


def write_folder(base: Base, adapter: Adapter, folder: Path, part: int, patterns: bool) -> None:
    """Write term `part` of every site as a PEFT folder; whole tensors go with the first.

    With `patterns`, ranks and alphas are written out site by site: the patterns in the config may
    be meant for other module paths.
    """
    folder.mkdir(parents=True)
    deltas = [delta for delta in adapter.deltas if len(delta.terms) > part]
    tensors: dict[str, Tensor] = {}
    for delta in deltas:
        tensors.update(peft_tensors(base, delta, delta.terms[part]))
    if part == 0:
        tensors.update((saved.tensor.name, saved.tensor) for saved in adapter.replacements)
    config = _config(adapter, deltas, part)
    if patterns and (config.get("rank_pattern") or config.get("alpha_pattern")):
        config.update(_patterns(config, deltas, part))
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _config(adapter: Adapter, deltas: list[Delta], part: int) -> dict[str, Any]:
    """The adapter's config with its targets written out, so that PEFT makes these sites alone."""
    config = dict(adapter.config)
    targets = sorted({delta.site.path for delta in deltas})
    config.update(dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")))
    config["target_modules"] = targets or _NO_TARGET
    saved = sorted({r.site.path for r in adapter.replacements if not r.shared})
    config["modules_to_save"] = (saved if part == 0 else None) or None
    config["trainable_token_indices"] = _token_rows(adapter) if part == 0 else None
    if part:
        config.update(bias="none", lora_bias=False, use_dora=False)
    return config


def _token_rows(adapter: Adapter) -> Any:
    """`trainable_token_indices` without the modules whose rows are gone."""
    places = [r.site.path for r in adapter.replacements if r.rows is not None]
    indices = adapter.config.get("trainable_token_indices")
    if not places or not isinstance(indices, Mapping):
        return indices if places else None
    return {n: rows for n, rows in indices.items() if any(p.endswith(n) for p in places)}


def _patterns(config: Mapping[str, Any], deltas: list[Delta], part: int) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` that give every site its own rank and scale."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for delta in deltas:
        product = delta.terms[part].product
        if product is not None:
            a, _, scale = product
            key, rank = re.escape(delta.site.path), a.shape[0]
            ranks[key] = rank
            alphas[key] = scale * (sqrt(rank) if config.get("use_rslora") else rank)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
