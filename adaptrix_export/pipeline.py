"""The compiler on one screen: recipe in, proved artifact out.

recipe -> open base -> open adapters -> verify -> passes, each followed by verify
       -> lower -> package -> parity -> publish
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptrix_export.check.altered import oracle_folders
from adaptrix_export.check.bases import other_base
from adaptrix_export.check.drift import SHARE, Drift, measure, measure_apart
from adaptrix_export.check.job import Job, gate_specs
from adaptrix_export.check.parity import prove
from adaptrix_export.check.report import save, summary
from adaptrix_export.errors import ParityError, RecipeError
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import note_of, open_bases
from adaptrix_export.load.finite import check_finite
from adaptrix_export.load.mismatch import fitted
from adaptrix_export.lower import LOWERINGS
from adaptrix_export.lower.approximate import Loss, approximated
from adaptrix_export.lower.approximate import told as approximations_told
from adaptrix_export.lower.artifact import Artifact
from adaptrix_export.lower.weights import names
from adaptrix_export.package import (
    InputHashes,
    build_manifest,
    hash_file,
    publish,
    staging,
    write_manifest,
    write_package,
)
from adaptrix_export.passes.composition import Composition
from adaptrix_export.passes.pool import Pool
from adaptrix_export.passes.wire_context import PerLayer, WireContext
from adaptrix_export.passes.workshop import Workshop, workshop
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe_compose import compose_of
from adaptrix_export.recipe_redistribute import redistribution
from adaptrix_export.recipe_sections import Context
from adaptrix_export.recipe_words import ParityLevel, Pooling, Target
from adaptrix_export.redistributed import keep_redistributed, oracle_plan, with_oracle
from adaptrix_export.verify import verify

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
        if recipe.context is not None and _is_composed(recipe):
            asked = oracle_plan(original, plan)  # whose adapters a calibrated tau is found with
            wire = wire_context(recipe.context, recipe.on_mismatch.value, asked, progress)
            plan = with_effect(original, verify(wire(plan)), recipe.context, shop)
        inputs = InputHashes(original)
        with approximated(plan, rank, progress) as (plain, losses):
            lowering.admit(plain)
            lowered = with_slot_gates(recipe, plain, progress)
            artifact = lowering.lower(lowered, stage, progress, recipe.frontend.value)
            write_package(artifact, lowered)
            keep_redistributed(lowered, artifact)
            proved = plain if losses else oracle_plan(original, plan)
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
        write_manifest(stage, manifest)
        with progress.stage("publish"):
            publish(stage, recipe.out)
    told = tuple(f"adapter {a.name}: {note}" for a in original.adapters for note in a.notes)
    told += tuple(map(str, losses))
    return Outcome(recipe.out, report, manifest, told + notes(plan, artifact), plan.measured)


def open_plan(recipe: Recipe) -> Plan:
    """The plan before any pass: base and adapters as they are on disk, headers only.

    The adapters are read as they mean on this base; see `load/adjust.py` and `load/mismatch.py`.
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
    from adaptrix_export.passes.conflicts import conflicts

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


def with_slot_gates(recipe: Recipe, plan: Plan, progress: Progress) -> Plan:
    """The plan of adapters that stay apart, with the gates that each of them goes through."""
    if recipe.context is None or _is_composed(recipe):
        return plan
    wire = wire_context(recipe.context, recipe.on_mismatch.value, plan, progress, measure_apart)
    return verify(wire(plan))


def with_gates_of(gated: Plan, plain: Plan, plan: Plan) -> Plan:
    """`plan` with what made `gated` of `plain`: gates, history, and sites that got none."""
    dropped = tuple(a for a in gated.adjustments if a not in plain.adjustments)
    return replace(
        plan,
        gates=gated.gates,
        gate_stats=gated.gate_stats,
        history=gated.history,
        adjustments=plan.adjustments + dropped,
    )


def wire_context(
    context: Context,
    on_mismatch: str,
    measured_on: Plan,
    progress: Progress,
    measured_by: Callable[[Plan, Progress, str | None], Drift] = measure,
) -> WireContext:
    """The pass that a recipe's `context` asks for; `tau: calibrated` is measured on a plan whose
    adapters PEFT can load (see `check/drift.py`)."""
    tau = context.tau
    if isinstance(tau, str):
        text = read_text(context.text, "context.text") if context.text else None
        found = measured_by(measured_on, progress, text)
        tau = found.tau(SHARE if context.share is None else context.share, context.scope.value)
        progress.note(f"context: tau {tau:g}, measured over {found.tokens} tokens")
    return WireContext(
        mode=context.mode.value,
        tau=_by_layer(tau),
        weight=_by_layer(context.weight),
        scope=context.scope.value,
        stats=context.stats,
        on_mismatch=on_mismatch,
    )


def with_effect(original: Plan, plan: Plan, context: Context, shop: Workshop) -> Plan:
    """The gated plan with what it makes of the adapters, beside their plain merge."""
    from adaptrix_export.check.effect import EFFECT, measure  # PyTorch

    text = read_text(context.text, "context.text") if context.text else None
    found = measure(original, plan, shop.held(), text, shop.progress)
    return replace(plan, measured={**plan.measured, EFFECT: found})


def _by_layer(value: float | dict[int, float] | None) -> float | PerLayer | None:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


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
    )


def read_text(path: Path, key: str) -> str:
    """A UTF-8 text file of the user's, or RecipeError about the `key` that named it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(key, f"{path} ({error})", "a UTF-8 text file") from error


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
