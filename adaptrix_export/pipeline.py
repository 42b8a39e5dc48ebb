"""The compiler on one page: recipe in, proved artifact out.

open base and adapters -> passes, each followed by the invariants
                       -> lower -> package -> prove -> publish
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptrix_export.graph.expression import expression_of
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import note_of, open_bases
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.mismatch import fitted
from adaptrix_export.load.source import commit_of
from adaptrix_export.manage.places import remember
from adaptrix_export.measure.energy import energy
from adaptrix_export.package import build_manifest, write_manifest, write_package
from adaptrix_export.package.documents import ManifestDocument, ReportDocument
from adaptrix_export.package.layout import laid_out
from adaptrix_export.package.model_config import portability_notes
from adaptrix_export.package.redistributed import keep_redistributed
from adaptrix_export.package.tokenizer import choose_tokenizer
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.from_recipe import passes_of
from adaptrix_export.passes.quantize.from_recipe import storage_of
from adaptrix_export.passes.quantize.texts import loss_text
from adaptrix_export.passes.reference_plan import reference_plan
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.precision.settings import Quantization
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.checker import Checker
from adaptrix_export.prove.preflight.preflight import preflight
from adaptrix_export.prove.proof import ProofRequest, proof_of, require_passed
from adaptrix_export.prove.report import save
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.targets import Target
from adaptrix_export.recipe.words import ParityLevel
from adaptrix_export.save.hashes import FileHash, InputHashes, hash_file
from adaptrix_export.save.staging import publish, staging
from adaptrix_export.show.write import stage_page
from adaptrix_export.targets import TARGETS
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.options import LowerOptions

REPORT = "report.json"


@dataclass(frozen=True)
class Outcome:
    """What a build made: where, how it was proved (None: not at all), and what to know of it."""

    out: Path
    report: dict[str, Any] | None
    manifest: dict[str, Any]
    notes: tuple[str, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)  # by passes: sections of the report


def build(
    recipe: Recipe,
    progress: Progress | None = None,
    hasher: Callable[[Path], FileHash] = hash_file,
) -> Outcome:
    """Build, prove and publish one artifact; nothing is published if anything fails.

    `hasher` may know the hashes of inputs that several builds share.

    Raises InputError for what cannot be built, ParityError (with `.report`) for what was built
    and is not right, MachineError for a machine that gave up.
    """
    progress = progress or Silent()
    target = TARGETS[recipe.target]
    opened = verify(open_plan(recipe))
    switched = recipe.target is Target.ONNX_SWITCHABLE
    tokenizer = choose_tokenizer(opened, recipe.tokenizer.value, switched)
    if recipe.slots is None:  # else a pass may make adapters fit that do not yet
        target.admit(opened)
    with (
        staging(recipe.out, target.estimate(opened, storage_of(recipe, opened))) as stage,
        pass_context(progress) as context,
        Checker() as checker,
    ):
        check_finite(opened, progress)
        plan = run_passes(passes_of(recipe, opened, context), opened)
        target.admit(plan)
        inputs = InputHashes(opened, hasher)
        options = lower_options(recipe, plan, checker)
        if recipe.parity.level is not ParityLevel.OFF and options.storage.quantization is None:
            checker.start()  # its imports overlap with the merge; a calibration needs the memory
        artifact = target.lower(plan, stage, progress, options)
        artifact = laid_out(artifact, recipe.layout.value, opened.base.task)
        write_package(artifact, plan, tokenizer.folder, recipe.portable)
        keep_redistributed(plan, artifact)
        report = prove_build(
            recipe, opened, plan, artifact, progress, checker, options.storage.quantization
        )
        manifest = build_manifest(
            artifact,
            plan,
            recipe=recipe.model_dump(mode="json"),
            inputs=inputs.result(),
            provider=recipe.provider.value if artifact.frontend else None,
            parity="proved" if report else "unverified",
            report_sha256=hash_file(stage / REPORT).sha256 if report else None,
        )
        manifest["revisions"] = revisions(opened)
        manifest["energy"] = energy(opened, plan)
        document = ManifestDocument.of(manifest)
        if recipe.report:
            proof = ReportDocument.of(report) if report else None
            document = stage_page(stage, document, proof)
        manifest = document.as_dict()
        write_manifest(stage, manifest)
        with progress.stage("publish"):
            publish(stage, recipe.out)
        remember(recipe.out, recipe.model_dump(mode="json"))
    portability = portability_notes(artifact.target, opened.base.config, recipe.portable)
    known = (*notes(opened, plan, artifact), *tokenizer.notes, *portability)
    return Outcome(recipe.out, report, manifest, known, plan.measured)


def open_plan(recipe: Recipe) -> Plan:
    """The plan before any pass: base and adapters as they are on disk, headers only.

    The adapters are read as they mean on this base; see the modules `adjust` and `mismatch` of
    `load.fit`.
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


def run_passes(steps: Iterable[Pass], plan: Plan) -> Plan:
    """Every pass in turn; what holds of every plan is checked after each."""
    for step in steps:
        plan = verify(step(plan))
    return plan


def lower_options(recipe: Recipe, plan: Plan, checker: Checker) -> LowerOptions:
    return LowerOptions(
        frontend=recipe.frontend.value,
        provider=recipe.provider.value,
        trial=partial(preflight, checker=checker),
        rows=recipe.rows,
        storage=storage_of(recipe, plan),
    )


def prove_build(
    recipe: Recipe,
    opened: Plan,
    plan: Plan,
    artifact: Artifact,
    progress: Progress,
    checker: Checker,
    blocks: Quantization | None = None,
) -> dict[str, Any] | None:
    """Prove the staged artifact and put report.json into it; None with parity off.

    `opened` is the plan before any pass. A failed proof is saved as `<out>.rejected.json` and
    raised.
    """
    if recipe.parity.level is ParityLevel.OFF:
        return None
    request = ProofRequest.of_build(recipe, plan, artifact)
    if blocks is not None and blocks.calibration is not None:
        text = loss_text(plan.base, blocks.calibration)
        request = replace(
            request, loss_rows=text.rows, loss_text=text.source,
            max_kl=blocks.max_kl, min_cosine=blocks.min_cosine,
        )  # fmt: skip
    proof = proof_of(request, reference_plan(opened, plan), progress, checker)
    report = {**proof, **plan.measured}
    if not report["passed"]:
        rejected = recipe.out.with_name(recipe.out.name + ".rejected.json")
        save(report, rejected)
        require_passed(report, str(recipe.out), f"nothing was published; see {rejected}")
    save(report, artifact.folder / REPORT)
    return report


def notes(opened: Plan, plan: Plan, artifact: Artifact) -> tuple[str, ...]:
    """What a user should know beyond 'done'."""
    read_so = (f"adapter {a.name}: {note}" for a in opened.adapters for note in a.notes)
    untied = (
        f"{name} shared its weights with {plan.base.tied[name]} and has its own now"
        for name in artifact.untied
    )
    expressions = [*artifact.weights.values()]
    expressions += [expression_of(entry["expression"]) for entry in artifact.quantized.values()]
    read = {name for expression in expressions for name in expression.names()}
    beyond = (
        f"{name} is adapted, and is not part of the graph, which ends before it"
        for name in sorted(set(plan.changes()) - read)
    )
    floats = (f"{name} stays float: {why}" for name, why in artifact.kept_float.items())
    adjustments = (str(adjustment) for adjustment in plan.adjustments)
    losses = map(str, plan.losses)
    return (*read_so, *losses, *note_of(plan.base), *untied, *beyond, *floats, *adjustments)


def revisions(plan: Plan) -> dict[str, str]:
    """The commit of every source that came from the hub, by how the recipe names it."""
    sources = [(plan.base.spec, plan.base.folder), *((a.spec, a.folder) for a in plan.adapters)]
    commits = ((spec, commit_of(spec, folder)) for spec, folder in sources)
    return {spec: commit for spec, commit in commits if commit is not None}
