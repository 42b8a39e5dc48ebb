"""Gives an adapter of another format a PEFT configuration.

The scale that is applied is the one that PEFT computes from that configuration, bit for bit, so the
oracle and the lowering cannot differ in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdapterError
from adaptrix_export.load.adapters.peft_adapter import check_config, rank_and_scale
from adaptrix_export.load.adapters.peft_keys import module_paths
from adaptrix_export.plan import Adapter, Base, Delta, Dora, LowRank

SAME = 1e-15  # relative difference of two ways to compute a scale: a few float64 roundings

Factors = LowRank | Dora


def foreign_adapter(
    place: str,
    spec: str,
    files: tuple[Path, ...],
    base: Base,
    terms: Mapping[str, Factors],
    metadata: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """The Adapter for `terms`, module path -> factors; `config` is used if it agrees with them.

    Raises AdapterError if there are no terms.
    """
    if not terms:
        raise AdapterError(place, "no tensors", "at least one site", "is the folder complete?")
    if config is not None:
        check_config(place, config)
    stated = config if config and config_matches(place, config, terms) else peft_config(base, terms)
    scaled = {p: replace(t, scale=rank_and_scale(place, p, stated)[1]) for p, t in terms.items()}
    deltas = [Delta(base.architecture.site_of(path), (term,)) for path, term in scaled.items()]
    return Adapter(
        name=place,
        spec=spec,
        folder=files[0].parent,
        files=files,
        config=stated,
        deltas=tuple(sorted(deltas, key=lambda d: d.site.order)),
        replacements=(),
        notes=notes,
        foreign=True,
        metadata=metadata,
    )


def config_matches(place: str, config: Mapping[str, Any], terms: Mapping[str, Factors]) -> bool:
    """Whether `config` gives each module the rank and scale of its term, by PEFT's rules."""
    if bool(config.get("use_dora")) != any(t.lora_magnitude is not None for t in terms.values()):
        return False
    for path, term in terms.items():
        rank, scale = rank_and_scale(place, path, config)
        if rank != term.rank or abs(scale - term.scale) > SAME * abs(term.scale):
            return False
    return True


def peft_config(base: Base, terms: Mapping[str, Factors]) -> dict[str, Any]:
    """An adapter_config.json for these modules; ranks and scales that differ become patterns."""
    numbers = {path: (t.rank, t.scale * t.rank) for path, t in sorted(terms.items())}
    rank, alpha = max(Counter(numbers.values()).items(), key=lambda n: (n[1], n[0]))[0]
    # The first pattern that matches the end of a path counts, so the longest path comes first.
    paths = sorted(numbers, key=lambda p: (-len(p), p))
    causal = any(str(n).endswith("ForCausalLM") for n in base.config.get("architectures") or ())
    stacked = any(base.architecture.site_of(path).layer is not None for path in terms)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(p): numbers[p][0] for p in paths if numbers[p][0] != rank},
        "alpha_pattern": {re.escape(p): numbers[p][1] for p in paths if numbers[p][1] != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": base.architecture.family.conv1d and stacked,
        "use_dora": any(t.lora_magnitude is not None for t in terms.values()),
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": _targets(base, set(terms)),
    }


def _targets(base: Base, paths: set[str]) -> list[str]:
    """Module names if they match only modules with factors; else full paths."""
    modules = module_paths(base)
    short = {base.architecture.site_of(path).module for path in paths}
    meant = {m for m in modules if any(m == s or m.endswith("." + s) for s in short)}
    return sorted(short if meant == paths else paths)
