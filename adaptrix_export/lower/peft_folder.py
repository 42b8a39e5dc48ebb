"""Target `peft`: the plan's adapter as a standard PEFT folder, no base in it."""

from __future__ import annotations

from pathlib import Path

from adaptrix_export.convert import write_peft
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.peft_adapter import CONFIG, WEIGHTS
from adaptrix_export.lower.artifact import Artifact
from adaptrix_export.lower.weights import tensor
from adaptrix_export.package.hashes import hash_file
from adaptrix_export.passes.written import with_one_term_a_site
from adaptrix_export.plan import Plan, Tuned
from adaptrix_export.progress import Progress


def lower_peft_folder(plan: Plan, stage: Path, progress: Progress) -> Artifact:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    The weights that the check compares are those of the base with this adapter merged in.
    Raises UnsupportedError for more than one adapter and for tuners other than LoRA.
    """
    if len(plan.adapters) != 1:
        raise UnsupportedError("target peft", f"{len(plan.adapters)} adapters", "one")
    adapter = plan.adapters[0]
    if any(isinstance(t, Tuned) for d in adapter.deltas for t in d.terms):
        raise UnsupportedError(
            f"{adapter.name}: target peft", str(adapter.config.get("peft_type")), "LoRA",
            "it is a PEFT folder already",
        )  # fmt: skip
    with progress.stage("writing the adapter"):
        write_peft(with_one_term_a_site(adapter, plan.base), plan.base, stage)
    return Artifact(
        folder=stage,
        target="peft",
        precision="fp32",  # what the check computes in; factors keep their own dtypes
        hashes={name: hash_file(stage / name).sha256 for name in (CONFIG, WEIGHTS)},
        weights={name: tensor(name) for name in sorted(plan.changes())},
        untied=(),
        config_changes={},
    )
