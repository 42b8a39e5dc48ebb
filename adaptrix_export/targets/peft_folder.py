"""Target `peft`: the plan's adapter as a standard PEFT folder, no base in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import TensorRef
from adaptrix_export.load.adapters.peft_adapter import CONFIG, WEIGHTS
from adaptrix_export.passes.redistribute.written import with_one_term_a_site
from adaptrix_export.plan import Adapter, Delta, Gate, LowRank, Plan, Scaled, Site, Term
from adaptrix_export.progress import Progress
from adaptrix_export.save.hashes import hash_file
from adaptrix_export.save.peft_folder import write_peft
from adaptrix_export.targets.artifact import Artifact


def lower_peft_folder(plan: Plan, stage: Path, progress: Progress) -> Artifact:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    The weights that the check compares are those of the base with this adapter merged in.
    Raises UnsupportedError for more than one adapter, for tuners other than LoRA, and for gates
    that depend on the data.
    """
    for site, gate in plan.gated().items():
        raise UnsupportedError(
            f"context: {site.path}", f"a {gate.mode} gate in an adapter", "an onnx target",
            "use --target onnx, or mode blend",
        )  # fmt: skip
    if len(plan.adapters) != 1:
        raise UnsupportedError("target peft", f"{len(plan.adapters)} adapters", "one")
    adapter = plan.adapters[0]
    if any(t.is_layer_made for d in adapter.deltas for t in d.terms):
        raise UnsupportedError(
            f"{adapter.name}: target peft", str(adapter.config.get("peft_type")), "LoRA",
            "it is a PEFT folder already",
        )  # fmt: skip
    adapter = _blended(adapter, {gate.site: gate for gate in plan.gates})
    with progress.stage("writing the adapter"):
        write_peft(with_one_term_a_site(adapter, plan.base), plan.base, stage)
    return Artifact(
        folder=stage,
        target="peft",
        precision="fp32",  # what the check computes in; factors keep their own dtypes
        hashes={name: hash_file(stage / name).sha256 for name in (CONFIG, WEIGHTS)},
        weights={name: TensorRef(name) for name in sorted(plan.changes())},
        untied=(),
        config_changes={},
        gates=plan.gates,
    )


def _blended(adapter: Adapter, gates: Mapping[Site, Gate]) -> Adapter:
    """The adapter with the weight of each blended site in its scale."""
    weights = {site: gate.weight for site, gate in gates.items() if gate.weight is not None}
    deltas = (
        _scaled(delta, weights[delta.site]) if delta.site in weights else delta
        for delta in adapter.deltas
    )
    return replace(adapter, deltas=tuple(deltas))


def _scaled(delta: Delta, weight: float) -> Delta:
    terms: list[Term] = []
    for term in delta.terms:
        if not isinstance(term, (LowRank, Scaled)):
            raise UnsupportedError(
                f"context: {delta.site.path}", f"a {type(term).__name__} term times {weight:g}",
                "LoRA", "PEFT has no scale for it; use target onnx or safetensors",
            )  # fmt: skip
        terms.append(replace(term, scale=term.scale * weight))
    return replace(delta, terms=tuple(terms))
