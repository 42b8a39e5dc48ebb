"""A proof: an artifact, staged or published, against the oracle of the plan that it was made of.

Build, `verify` and `add-adapter` ask for it in the same way: what they know of the artifact is a
`ProofRequest`, and from there on nothing differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import Expression, expressions_of
from adaptrix_export.load.sentence import AUTO, saved_pooling
from adaptrix_export.load.text import read_text
from adaptrix_export.oracle.job import GateSpec, Job, gate_specs
from adaptrix_export.oracle.naming import OracleFacts
from adaptrix_export.oracle.peft_folders import OracleFolders, oracle_folders
from adaptrix_export.package.documents import ManifestDocument, ReportDocument
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress
from adaptrix_export.prove.bases import other_base
from adaptrix_export.prove.checker import Checker
from adaptrix_export.prove.long_prompts import AUTO as LONG
from adaptrix_export.prove.long_prompts import long_crossings
from adaptrix_export.prove.parity import prove
from adaptrix_export.prove.report import summary
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.words import Pooling
from adaptrix_export.targets.artifact import Artifact

NO_POOLING = Pooling.NONE.value


@dataclass(frozen=True)
class ProofRequest:
    """What is to be proved, and how hard to look; the fields are those of `oracle.job.Job`."""

    target: str
    folder: Path
    precision: str
    weights: Mapping[str, Expression]
    gates: tuple[GateSpec, ...] = ()
    gate_stats: bool = False
    composition: Mapping[str, Any] | None = None
    pooling: str | None = None
    level: str = "full"
    decode_steps: int = 32
    text: str | None = None
    long: str = LONG
    adapter_folder: Path | None = None
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss_rows: tuple[tuple[int, ...], ...] = ()
    loss_text: str = "the proof's own prompt"
    max_kl: float | None = None
    min_cosine: float | None = None

    @classmethod
    def of_build(cls, recipe: Recipe, plan: Plan, artifact: Artifact) -> ProofRequest:
        """An artifact that was just lowered from `plan`."""
        text = recipe.parity.text
        return cls(
            target=artifact.target,
            folder=artifact.folder,
            precision=artifact.precision,
            weights=artifact.weights,
            gates=gate_specs(artifact.gates),
            gate_stats=artifact.gate_stats,
            composition=plan.composition.as_dict() if plan.composition else None,
            pooling=None if recipe.pooling is Pooling.NONE else recipe.pooling.value,
            level=recipe.parity.level.value,
            decode_steps=recipe.parity.decode_steps,
            text=read_text(text, "parity.text") if text else None,
            quantized=artifact.quantized,
            long=recipe.parity.long.value,
        )

    @classmethod
    def of_manifest(
        cls, folder: Path, manifest: ManifestDocument, text: str | None = None
    ) -> ProofRequest:
        """A published artifact, asked as hard as when it was built, on `text` if that is at hand.

        One that was never proved is asked in full.
        """
        recipe = manifest.recipe
        parity, pooling = recipe["parity"], recipe.get("pooling", NO_POOLING)
        level = parity.get("level", "full")
        return cls(
            target=manifest.target,
            folder=folder,
            precision=manifest.precision,
            weights=expressions_of(manifest.weights, "manifest.json: weights"),
            gates=gates_of(manifest),
            gate_stats=manifest.context is not None and manifest.context.stats,
            composition=manifest.composition,
            pooling=None if pooling == NO_POOLING else pooling,
            level="full" if level == "off" else level,
            decode_steps=parity["decode_steps"],
            text=text,
            quantized=manifest.quantized,
            long=parity.get("long", LONG),
        )

    def job(self, plan: Plan, folders: OracleFolders) -> Job:
        """The job of the checking process; `folders` are those of the plan's adapters."""
        return Job(
            target=self.target,
            artifact=self.folder,
            base_folder=plan.base.folder,
            precision=self.precision,
            weights=self.weights,
            gguf_file=plan.base.gguf_file,
            task=plan.base.task,
            adapters=folders.adapters,
            level=self.level,
            decode_steps=self.decode_steps,
            text=self.text,
            quantized=self.quantized,
            loss_rows=self.loss_rows,
            loss_text=self.loss_text,
            max_kl=self.max_kl,
            min_cosine=self.min_cosine,
            simulated=plan.base.simulated,
            other=other_base(plan),
            pooling=saved_pooling(plan.base.folder) if self.pooling == AUTO else self.pooling,
            composition=self.composition,
            gates=self.gates,
            gate_stats=self.gate_stats,
            adapter_folder=self.adapter_folder,
            drawn=plan.base.skeleton is not None,
            crossings=long_crossings(plan.base, self.long),
            oracle=OracleFacts(
                redistributed=plan.redistributed,
                adjusted=bool(plan.adjustments),
                converted=folders.converted,
                approximated=tuple(loss.adapter for loss in plan.losses),
            ),
        )


def proof_of(
    request: ProofRequest, plan: Plan, progress: Progress, checker: Checker | None = None
) -> dict[str, Any]:
    """The parity report, passed or not; of a process of its own, or of one that runs already.

    `plan` is the one whose adapters stock PEFT loads (`passes.reference_plan`).
    """
    with oracle_folders(plan) as folders:
        report = prove(request.job(plan, folders), progress, checker=checker)
    return with_plan(report, plan)


def with_plan(report: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The report with what was adjusted and approximated before the adapters were lowered."""
    if plan.adjustments:
        report["adjustments"] = [str(adjustment) for adjustment in plan.adjustments]
    if plan.losses:
        report["approximated"] = {loss.adapter: loss.as_dict() for loss in plan.losses}
    return report


def require_passed(report: dict[str, Any], place: str, remedy: str) -> None:
    """Raise ParityError, with the report, for a proof that failed."""
    if not report["passed"]:
        error = ParityError(place, summary(ReportDocument.of(report)), "parity", remedy)
        error.report = report
        raise error


def gates_of(manifest: ManifestDocument) -> tuple[GateSpec, ...]:
    """The gates of a published artifact, in the order of its statistics."""
    gates = manifest.context.gates if manifest.context else ()
    return tuple(GateSpec(g.site, g.mode, tau=g.tau, weight=g.weight) for g in gates)
