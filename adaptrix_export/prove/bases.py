"""How far apart a model is on the two sets of base weights that it could be merged into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptrix_export.load.base_weights import weights_read
from adaptrix_export.oracle.compare import Logits, distance, rounded
from adaptrix_export.oracle.job import Job, OtherBase
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.prove.cases import Ask

if TYPE_CHECKING:
    from adaptrix_export.plan import Plan

WORDS = {"original": "dequantized", "dequantized": "original"}


def other_base(plan: Plan) -> OtherBase | None:
    """The base weights of a plan that were not chosen, as the check opens them."""
    base = plan.alternative
    if base is None:
        return None
    return OtherBase(weights_read(base), base.folder, base.gguf_file, base.simulated)


def compare_bases(job: Job, ask: Ask, prompts: Prompts, chosen: Logits) -> dict[str, Any]:
    """The report's `base_weights`: the adapters on the other weights, on the same prompts.

    `chosen` is the reference's answer (positions, vocabulary) on the weights merged into. KL is
    in nats a token, the weights merged into against the others. It judges nothing: which choice
    is better, a task must tell.
    """
    from adaptrix_export.oracle.executed import Executed
    from adaptrix_export.oracle.reference import Reference

    assert job.other is not None
    reference = (Executed if job.composition else Reference).open(job.on_other())
    other = ask(reference, prompts).logits
    reference.close()
    difference = distance(chosen, other)
    return {
        "merged_into": WORDS[job.other.weights],
        "compared_with": job.other.weights,
        "positions": len(chosen),
        "mean_kl": rounded(difference.mean_kl),
        "max_abs": rounded(difference.max_abs),
        "top1": rounded(difference.top1, 5),
    }
