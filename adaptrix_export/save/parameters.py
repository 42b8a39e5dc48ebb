"""LoRA on stacked parameters in PEFT's own form (`target_parameters`), and targets by full path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from adaptrix_export.load.adapters.peft_keys import PREFIX
from adaptrix_export.load.quantized.experts import fusion_of
from adaptrix_export.plan import Base, Delta, Dora, Experts, LowRank, Tensor, on_experts

_NO_TARGET = "dummy-target-modules"  # what PEFT calls an adapter without any


def parameter_tensors(base: Base, deltas: Iterable[Delta]) -> dict[str, Tensor]:
    """PEFT's keys -> factors. PEFT wraps a module once for each parameter, in their order: the last
    wrapper is outermost, and the inner ones are its `base_layer`."""
    fusion = fusion_of(base.architecture.model_type)
    order = [*(fusion.parameters if fusion else ()), "weight", "bias"]
    modules: dict[str, dict[str, Experts]] = {}
    for delta in deltas:
        (term,) = on_experts(delta.terms)
        modules.setdefault(delta.site.path, {})[delta.parameter] = term
    tensors: dict[str, Tensor] = {}
    for module, terms in modules.items():
        names = sorted(terms, key=order.index)
        for depth, name in enumerate(reversed(names)):
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{place}.lora_A.weight"] = terms[name].a
            tensors[f"{place}.lora_B.weight"] = terms[name].b
    return tensors


def parameter_config(
    config: Mapping[str, Any], factors: Mapping[str, LowRank | Dora], stacked: Iterable[Delta]
) -> dict[str, Any]:
    """The fields of adapter_config.json that assign factors: every target by its full path, with
    its rank and alpha, since the original config's patterns may match other paths."""
    terms: dict[str, LowRank | Dora | Experts] = dict(factors)
    for delta in stacked:
        (term,) = on_experts(delta.terms)
        terms[delta.name] = term
    alphas = {
        re.escape(path): term.scale * (sqrt(term.rank) if config.get("use_rslora") else term.rank)
        for path, term in terms.items()
    }
    return {
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "target_modules": sorted(factors) or _NO_TARGET,
        "target_parameters": sorted(delta.name for delta in stacked) or None,
        "rank_pattern": {re.escape(path): term.rank for path, term in terms.items()},
        "alpha_pattern": alphas,
    }
