"""The compiler on one screen: recipe in, proved artifact out.

recipe -> open base -> open adapters -> verify -> passes, each followed by verify
       -> lower -> package -> parity -> publish
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.check.altered import oracle_folders
from adaptrix_export.check.bases import other_base
from adaptrix_export.check.job import Job
from adaptrix_export.check.parity import prove
from adaptrix_export.check.report import save, summary
from adaptrix_export.errors import ParityError
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import note_of, open_bases
from adaptrix_export.load.finite import check_finite
from adaptrix_export.load.mismatch import fitted
from adaptrix_export.lower import LOWERINGS
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
from adaptrix_export.passes.compose import Compose
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe_words import ParityLevel
from adaptrix_export.verify import verify

REPORT = "report.json"


@dataclass(frozen=True)
class Outcome:
    """What a build made: where, how it was proved (None: not at all), and what to know of it."""

    out: Path
    report: dict[str, Any] | None
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def build(recipe: Recipe, progress: Progress | None = None) -> Outcome:
    """Build, prove and publish one artifact; nothing is published if anything fails.

    Raises InputError for what cannot be built, ParityError (with `.report`) for what was built
    and is not right, MachineError for a machine that gave up.
    """
    progress = progress or Silent()
    original = open_plan(recipe)
    plan = verify(original)
    for step in passes(recipe):
        plan = verify(step(plan))
    lowering = LOWERINGS[recipe.target.value]
    with staging(recipe.out, lowering.estimate(plan)) as stage:
        check_finite(plan, progress)
        inputs = InputHashes(original)
        artifact = lowering.lower(plan, stage, progress)
        write_package(artifact, plan)
        report = check(recipe, original, artifact, progress)
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
    return Outcome(recipe.out, report, manifest, told + notes(plan, artifact))


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


def passes(recipe: Recipe) -> tuple[Pass, ...]:
    """What happens to the plan, in order."""
    return (Compose(),)


def check(
    recipe: Recipe, original: Plan, artifact: Artifact, progress: Progress
) -> dict[str, Any] | None:
    """Prove the staged artifact and put report.json into it; None with parity off.

    A failed proof is saved as `<out>.rejected.json` and raised.
    """
    if recipe.parity.level is ParityLevel.OFF:
        return None
    with oracle_folders(original) as folders:
        report = folders.told(
            prove(parity_job(recipe, original, artifact, folders.adapters), progress)
        )
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
    recipe: Recipe, original: Plan, artifact: Artifact, adapters: tuple[tuple[str, Path], ...]
) -> Job:
    """What the check needs to know: the artifact, and the original files it came from.

    `adapters` are the folders that stock PEFT is to load, by name.
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
        text=read_text(text) if text else None,
        simulated=original.base.simulated,
        other=other_base(original),
    )


def read_text(path: Path) -> str:
    """A UTF-8 text file of the user's, or RecipeError."""
    from adaptrix_export.errors import RecipeError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("parity.text", f"{path} ({error})", "a UTF-8 text file") from error


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
