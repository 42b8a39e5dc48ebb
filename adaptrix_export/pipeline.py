"""The compiler on one screen: recipe in, proved artifact out.

recipe -> open base -> open adapters -> verify -> passes, each followed by verify
       -> lower -> package -> parity -> publish
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import names
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import note_of, open_bases
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.mismatch import fitted
from adaptrix_export.load.text import read_text
from adaptrix_export.measure.energy import energy
from adaptrix_export.oracle.job import Job, gate_specs
from adaptrix_export.oracle.peft_folders import oracle_folders
from adaptrix_export.package import (
    InputHashes,
    build_manifest,
    hash_file,
    publish,
    staging,
    write_manifest,
    write_package,
)
from adaptrix_export.package.redistributed import keep_redistributed, with_oracle
from adaptrix_export.passes.approximate import Loss, approximated
from adaptrix_export.passes.approximate import told as approximations_told
from adaptrix_export.passes.context import Workshop, workshop
from adaptrix_export.passes.from_recipe import compose_of, redistribution
from adaptrix_export.passes.gating import with_context, with_gates_of
from adaptrix_export.passes.pool import Pool
from adaptrix_export.passes.reference_plan import reference_plan
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.plan.composition import Composition
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.bases import other_base
from adaptrix_export.prove.parity import prove
from adaptrix_export.prove.preflight.preflight import preflight
from adaptrix_export.prove.report import save, summary
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.words import ParityLevel, Pooling, Target
from adaptrix_export.show.write import stage_page
from adaptrix_export.targets import LOWERINGS
from adaptrix_export.targets.artifact import Artifact

REPORT = "report.json"


@dataclass(frozen=True)
class Outcome:
    """What a build made: where, how it was proved (None: not at all), and what to know of it."""

    out: Path
    report: dict[str, Any] | None
    manifest: dict[str, Any]
    notes: tuple[str, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)  # by passes: sections of the report


def build(recipe: Recipe, progress: Progress | None = None) -> Outcome:
    """Build, prove and publish one artifact; nothing is published if anything fails.

    Raises InputError for what cannot be built, ParityError (with `.report`) for what was built
    and is not right, MachineError for a machine that gave up.
    """
    progress = progress or Silent()
    original = verify(open_plan(recipe))
    lowering = LOWERINGS[recipe.target.value + " rows" * recipe.rows]
    rank = recipe.slots.rank if recipe.slots else None
    if rank is None:
        lowering.admit(original)
    with (
        staging(recipe.out, lowering.estimate(original)) as stage,
        workshop(progress) as shop,
    ):
        check_finite(original, progress)
        plan = with_conflicts(original, progress) if _is_composed(recipe) else original
        for step in passes(recipe, shop):
            plan = verify(step(plan))
        inputs = InputHashes(original)
        with approximated(plan, rank, progress) as (plain, losses):
            lowering.admit(plain)
            lowered = with_context(recipe, original, plain, shop)
            artifact = lowering.lower(lowered, stage, progress, recipe.frontend.value, preflight)
            write_package(artifact, lowered)
            keep_redistributed(lowered, artifact)
            proved = plain if losses else reference_plan(original, plan)
            report = check(recipe, proved, lowered, artifact, progress, losses)
            plan = with_gates_of(lowered, plain, plan)
        manifest = build_manifest(
            artifact,
            plan,
            recipe=recipe.model_dump(mode="json"),
            inputs=inputs.result(),
            provider=recipe.provider.value if artifact.frontend else None,
            parity="proved" if report else "unverified",
            report_sha256=hash_file(stage / REPORT).sha256 if report else None,
        )
        manifest["energy"] = energy(original, plan)
        if recipe.report:
            manifest = stage_page(stage, manifest, report)
        write_manifest(stage, manifest)
        with progress.stage("publish"):
            publish(stage, recipe.out)
    told = tuple(f"adapter {a.name}: {note}" for a in original.adapters for note in a.notes)
    told += tuple(map(str, losses))
    return Outcome(recipe.out, report, manifest, told + notes(plan, artifact), plan.measured)


def open_plan(recipe: Recipe) -> Plan:
    """The plan before any pass: base and adapters as they are on disk, headers only.

    The adapters are read as they mean on this base; see the modules
    `adjust` and `mismatch` of `load.fit`.
    """
    specs = [adapter.source for adapter in recipe.adapters]
    simulated = recipe.simulate.value if recipe.simulate else None
    base, other = open_bases(
        recipe.base,
        recipe.base_weights.value,
        simulated,
        recipe.original_base,
        task=recipe.task.value,
        adapters=specs,
    )
    reading = Reading(recipe.allow_pickle, recipe.adaptrix_scaling.value)
    adapters = tuple(open_adapter(a.source, base, a.name, reading) for a in recipe.adapters)
    return fitted(Plan(base, adapters, alternative=other), recipe.on_mismatch.value)


def _is_composed(recipe: Recipe) -> bool:
    """Whether several adapters become one; in slots each stays by itself."""
    return recipe.target is not Target.ONNX_SWITCHABLE


def with_conflicts(plan: Plan, progress: Progress) -> Plan:
    """The plan with the conflict report of its adapters, if it has several."""
    if len(plan.adapters) < 2:
        return plan
    from adaptrix_export.measure.conflicts import conflicts

    return replace(plan, measured={**plan.measured, "conflicts": conflicts(plan, progress)})


def passes(recipe: Recipe, shop: Workshop) -> tuple[Pass, ...]:
    """What happens to the plan, in order, before its context is wired; a pass may leave files in
    the workshop."""
    if not _is_composed(recipe):
        return ()
    names = [adapter.name for adapter in recipe.adapters]
    steps: list[Pass] = [compose_of(recipe.compose, names, shop.progress)]
    if recipe.redistribute is not None:
        steps.append(redistribution(recipe.redistribute, shop))
    if recipe.pooling is not Pooling.NONE:
        steps.append(Pool(recipe.pooling.value))
    return tuple(steps)


def check(
    recipe: Recipe,
    original: Plan,
    plan: Plan,
    artifact: Artifact,
    progress: Progress,
    losses: tuple[Loss, ...] = (),
) -> dict[str, Any] | None:
    """Prove the staged artifact and put report.json into it; None with parity off.

    `original` is the plan whose adapters stock PEFT is to load, `losses` are those of adapters that
    it has approximated. A failed proof is saved as `<out>.rejected.json` and raised.
    """
    if recipe.parity.level is ParityLevel.OFF:
        return None
    with oracle_folders(original, composed=plan.composition is not None) as folders:
        job = parity_job(recipe, original, artifact, folders.adapters, plan.composition)
        report = {**folders.told(prove(job, progress)), **plan.measured}
    report = approximations_told(with_oracle(report, original), losses)
    if not report["passed"]:
        rejected = recipe.out.with_name(recipe.out.name + ".rejected.json")
        save(report, rejected)
        error = ParityError(
            str(recipe.out), summary(report), "parity", f"nothing was published; see {rejected}"
        )
        error.report = report
        raise error
    save(report, artifact.folder / REPORT)
    return report


def parity_job(
    recipe: Recipe,
    original: Plan,
    artifact: Artifact,
    adapters: tuple[tuple[str, Path], ...],
    composition: Composition | None = None,
) -> Job:
    """What the check needs to know: the artifact, and the original files it came from.

    `adapters` are the folders that stock PEFT is to load, by name; `composition` is how they were
    composed, unless they simply are all active.
    """
    text = recipe.parity.text
    return Job(
        target=artifact.target,
        artifact=artifact.folder,
        base_folder=original.base.folder,
        precision=artifact.precision,
        weights=artifact.weights,
        gguf_file=original.base.gguf_file,
        task=original.base.task,
        adapters=adapters,
        level=recipe.parity.level.value,
        decode_steps=recipe.parity.decode_steps,
        text=read_text(text, "parity.text") if text else None,
        simulated=original.base.simulated,
        other=other_base(original),
        pooling=None if recipe.pooling is Pooling.NONE else recipe.pooling.value,
        composition=composition.as_dict() if composition else None,
        gates=gate_specs(artifact.gates),
        gate_stats=artifact.gate_stats,
        drawn=original.base.skeleton is not None,
    )


def notes(plan: Plan, artifact: Artifact) -> tuple[str, ...]:
    """What a user should know beyond 'done'."""
    untied = (
        f"{name} shared its weights with {plan.base.tied[name]} and has its own now"
        for name in artifact.untied
    )
    read = {name for expression in artifact.weights.values() for name in names(expression)}
    beyond = (
        f"{name} is adapted, and is not part of the graph, which ends before it"
        for name in sorted(set(plan.changes()) - read)
    )
    adjustments = (str(adjustment) for adjustment in plan.adjustments)
    return (*note_of(plan.base), *untied, *beyond, *adjustments)
