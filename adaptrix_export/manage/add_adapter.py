"""One more adapter for a switchable artifact that is published already: a file and its proof.

The graph and its weights stay as they are; the new file is compared with the adapter's own live
model through the artifact's graph, then moved into the folder, the manifest last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.errors import OutputError, UnsupportedError, VerificationError
from adaptrix_export.graph.rewrite.slots import Slot, check_slots
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import AUTO, open_bases
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.mismatch import fitted
from adaptrix_export.measure.energy import energy
from adaptrix_export.package import (
    MANIFEST,
    InputHashes,
    addition,
    check_hashes,
    hash_file,
    install,
    read_manifest,
    write_manifest,
)
from adaptrix_export.package.documents import (
    BuiltRecipe,
    EnergyEntry,
    File,
    Input,
    ManifestDocument,
    SwitchableEntry,
    parse_document,
)
from adaptrix_export.plan import Base, Plan
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.proof import ProofRequest, gates_of, proof_of, require_passed
from adaptrix_export.prove.report import save
from adaptrix_export.recipe.sections import AdapterSpec
from adaptrix_export.runtime.adapters import FOLDER
from adaptrix_export.save.hashes import FileHash
from adaptrix_export.save.machine_paths import without_machine_paths
from adaptrix_export.targets.switchable_onnx import TARGET, add_adapter_file

# Writes the page of an artifact: (where to, the artifact, its manifest) -> the manifest with the
# page among its outputs, and the page's file, if the artifact has one.
PageWriter = Callable[[Path, Path, ManifestDocument], tuple[ManifestDocument, list[str]]]


@dataclass(frozen=True)
class Added:
    """What was added: the file, its entry in the manifest, and the proof (None: not proved)."""

    name: str
    file: Path
    entry: dict[str, Any]
    report: dict[str, Any] | None


def add_adapter(
    folder: Path,
    adapter: str,
    name: str | None = None,
    base: str | None = None,
    level: str = "full",
    progress: Progress | None = None,
    page: PageWriter | None = None,
) -> Added:
    """Write, prove and publish `adapters/NAME.onnx_adapter` in a published switchable artifact.

    `base` says where the base is now, by default where the recipe in the manifest says; `level`
    is full, fast or off; `page` writes the artifact's page anew. Raises AdapterError for a site
    without a slot, UnsupportedError for what no slot can hold, VerificationError for an artifact
    or a base that is not the one of the manifest, ParityError for a failed proof.
    """
    progress = progress or Silent()
    with addition(folder) as stage:  # two at once would each lose what the other wrote
        return _added(folder, stage, adapter, name, base, level, progress, page)


def _added(
    folder: Path,
    stage: Path,
    adapter: str,
    name: str | None,
    base: str | None,
    level: str,
    progress: Progress,
    page: PageWriter | None,
) -> Added:
    """The whole of it, under the lock of the artifact."""
    manifest = read_manifest(folder)
    parse_document(BuiltRecipe, manifest.recipe, f"{folder / MANIFEST}: recipe")
    switchable = switchable_part(folder, manifest)
    spec = AdapterSpec.model_validate({"source": adapter, **({"name": name} if name else {})})
    if spec.name in switchable.adapters:
        raise OutputError(
            f"{folder}: adapter {spec.name}", "exists", "a new name", "choose another --name"
        )
    check_artifact(folder, progress)
    plan = plan_with(manifest, open_base_of(manifest, base), spec)
    slots = [Slot.from_dict(entry) for entry in switchable.slots]
    shares = {gate.site: gate.weight for gate in gates_of(manifest) if gate.weight is not None}
    version = switchable.model_version
    check_finite(plan, progress)
    inputs = input_entries(manifest, plan, progress)
    (stage / FOLDER).mkdir()
    entry, _ = add_adapter_file(stage, slots, plan.adapters[0], version, shares)
    report = _prove(folder, stage, manifest, plan, level, progress)
    entry["parity"] = "proved" if report else "unverified"
    names = [entry["file"], entry["safetensors"]]
    if report:
        names.append(f"{FOLDER}/{spec.name}.report.json")
        save(report, stage / names[-1])
    outputs = {file: file_entry(stage / file) for file in names}
    changed = extended(manifest, spec, plan, entry, outputs, inputs)
    if page is not None:
        changed, pages = page(stage, folder, changed)
        names += pages
    write_manifest(stage, changed.as_dict())
    install(stage, folder, [*names, MANIFEST])
    return Added(spec.name, folder / entry["file"], entry, report)


def switchable_part(folder: Path, manifest: ManifestDocument) -> SwitchableEntry:
    switchable = manifest.switchable
    if manifest.target != TARGET or switchable is None:
        raise UnsupportedError(
            str(folder), f"target {manifest.target}", TARGET,
            "its adapters are merged in; build again with both",
        )  # fmt: skip
    if switchable.rows:
        raise UnsupportedError(
            str(folder), "adapters inside the graph (rows)", "slots",
            "build again with this adapter, or without `rows: true`",
        )  # fmt: skip
    return switchable


def check_artifact(folder: Path, progress: Progress) -> None:
    """Raises VerificationError if a file is not what the manifest says."""
    with progress.stage("hashes"):
        problems = check_hashes(folder)
    if problems:
        raise VerificationError(
            f"{folder}: {problems[0].file}", problems[0].found, problems[0].expected,
            "build it again",
        )  # fmt: skip


def open_base_of(manifest: ManifestDocument, base: str | None) -> Base:
    """The base that the artifact was built from, by the recipe or where `base` says it is now."""
    recipe = manifest.recipe
    opened, _ = open_bases(
        base or recipe["base"],
        recipe.get("base_weights", AUTO),
        recipe.get("simulate"),
        None if base else recipe.get("original_base"),
        task=GENERATION,  # the only one with slots
    )
    return opened


def plan_with(manifest: ManifestDocument, base: Base, spec: AdapterSpec) -> Plan:
    """The base of the artifact with the new adapter alone."""
    recipe = manifest.recipe
    reading = Reading(recipe.get("allow_pickle", False), recipe["adaptrix_scaling"])
    adapter = open_adapter(spec.source, base, spec.name, reading)
    plan = verify(fitted(Plan(base, (adapter,)), recipe.get("on_mismatch", "error")))
    check_slots(plan)
    return plan


def file_entry(path: Path) -> File:
    """A file as the manifest lists it."""
    written = hash_file(path)
    return File(bytes=written.bytes, sha256=written.sha256)


def _with_energy(manifest: ManifestDocument, plan: Plan) -> EnergyEntry:
    """The energies of the artifact's adapters and of the new one."""
    own = EnergyEntry.model_validate(energy(plan, plan))
    known = manifest.energy
    if known is None:
        return own
    return known.model_copy(update={"before": {**known.before, **own.before}})


def input_entries(
    manifest: ManifestDocument,
    plan: Plan,
    progress: Progress,
    hasher: Callable[[Path], FileHash] = hash_file,
) -> list[Input]:
    """The adapter's files, hashed; the base's must be those that the artifact was built from."""
    with progress.stage("originals"):
        files = InputHashes(plan, hasher).result()
    known = {(entry.file, entry.sha256) for entry in manifest.inputs}
    for item in files:
        if item.spec == plan.base.spec and (item.file, item.hash.sha256) not in known:
            raise VerificationError(
                item.file, "another file than the artifact was built from", "its own base",
                "name the base with --base",
            )  # fmt: skip
    return [
        Input(
            spec=without_machine_paths(i.spec),
            file=i.file,
            bytes=i.hash.bytes,
            sha256=i.hash.sha256,
        )
        for i in files
        if i.spec != plan.base.spec
    ]


def _prove(
    folder: Path,
    stage: Path,
    manifest: ManifestDocument,
    plan: Plan,
    level: str,
    progress: Progress,
) -> dict[str, Any] | None:
    """The report of the new adapter on the published graph. Raises ParityError if it is wrong."""
    if level == "off":
        return None
    request = proof_request(folder, stage, manifest, level)
    report = proof_of(request, plan, progress)
    require_passed(report, str(folder), "nothing was added")
    return report


def proof_request(
    folder: Path, stage: Path, manifest: ManifestDocument, level: str
) -> ProofRequest:
    """What is to be proved of adapters whose files are in `stage`."""
    return replace(
        ProofRequest.of_manifest(folder, manifest),
        weights={},  # the graph was proved before, and only the adapters are new
        level=level,
        adapter_folder=stage / FOLDER,
    )


def extended(
    manifest: ManifestDocument,
    spec: AdapterSpec,
    plan: Plan,
    entry: Mapping[str, Any],
    outputs: Mapping[str, File],
    inputs: list[Input],
) -> ManifestDocument:
    """The manifest with the adapter in it, as if the build had had it."""
    assert manifest.switchable is not None
    added = {"name": spec.name, "source": without_machine_paths(spec.source)}
    adapters = {**manifest.switchable.adapters, spec.name: dict(entry)}
    return manifest.model_copy(
        update={
            "recipe": {**manifest.recipe, "adapters": [*manifest.recipe["adapters"], added]},
            "switchable": manifest.switchable.model_copy(update={"adapters": adapters}),
            "inputs": [*manifest.inputs, *inputs],
            "outputs": {**manifest.outputs, **outputs},
            "energy": _with_energy(manifest, plan),
        }
    )
