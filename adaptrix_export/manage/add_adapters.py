"""Many adapters for a published switchable artifact, in one go.

Base, oracle and the artifact's session are opened once; adapters are read, written and proved one
after the other. A bad one is left out with its error, and the rest are published, some at a time,
the manifest last each time: whoever stops half way keeps what was published, and names that are
there already are left out when the same list is given again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adaptrix_export import errors
from adaptrix_export.errors import (
    AdaptrixError,
    MachineError,
    OutputError,
    ParityError,
    SourceError,
)
from adaptrix_export.graph.rewrite.slots import Slot
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.manage.add_adapter import (
    Added,
    PageWriter,
    check_artifact,
    extended,
    file_entry,
    input_entries,
    open_base_of,
    plan_with,
    proof_request,
    switchable_part,
)
from adaptrix_export.oracle.peft_folders import OracleFolders, oracle_folders
from adaptrix_export.package import (
    MANIFEST,
    addition,
    hash_file,
    install,
    read_manifest,
    write_manifest,
)
from adaptrix_export.package.documents import Input, ManifestDocument, ReportDocument
from adaptrix_export.plan import Base, Plan
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.each import prove_each
from adaptrix_export.prove.proof import gates_of, with_plan
from adaptrix_export.prove.report import save, summary
from adaptrix_export.recipe.sections import AdapterSpec
from adaptrix_export.runtime.adapters import FOLDER
from adaptrix_export.targets.switchable_onnx import add_adapter_file

TOGETHER = 64  # adapters that are published at once: what a stop can lose


@dataclass(frozen=True)
class LeftOut:
    """An adapter that was not added, and why."""

    name: str
    source: str
    error: AdaptrixError


@dataclass
class Several:
    """What became of a list of adapters, in its order."""

    added: list[Added] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass
class _Candidate:
    """An adapter on its way: its plan, its folders for the oracle, and what was written."""

    spec: AdapterSpec
    plan: Plan
    folders: OracleFolders
    entry: dict[str, Any]
    inputs: list[Input]
    report: dict[str, Any] | None = None


def read_list(path: Path) -> list[str]:
    """Sources of adapters, one a line; empty lines and lines that begin with # are skipped.

    Raises SourceError for a file that cannot be read as text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            str(path), f"cannot be read ({error})", "a text file, an adapter a line"
        ) from error
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def add_adapters(
    folder: Path,
    sources: Sequence[str],
    base: str | None = None,
    level: str = "full",
    progress: Progress | None = None,
    page: PageWriter | None = None,
) -> Several:
    """Write, prove and publish `adapters/NAME.onnx_adapter` of each source, named after it.

    Raises what `add_adapter` raises of the artifact and its base; what is wrong with one adapter
    is in the result.
    """
    progress = progress or Silent()
    manifest = read_manifest(folder)
    switchable_part(folder, manifest)
    check_artifact(folder, progress)
    opened = open_base_of(manifest, base)
    hasher = cache(hash_file)  # the base's files are hashed once
    input_entries(manifest, Plan(opened, ()), progress, hasher)
    outcome = Several()
    for first in range(0, len(sources), TOGETHER):
        group = sources[first : first + TOGETHER]
        with addition(folder) as stage, ExitStack() as stack:
            # read again under the lock: another process may have added some in between
            manifest = read_manifest(folder)
            made = list(
                _written(folder, stage, stack, manifest, opened, group, outcome, progress, hasher)
            )
            proved = _proved(folder, stage, manifest, made, level, outcome, progress)
            _publish(folder, stage, manifest, proved, outcome, page)
    return outcome


def _written(
    folder: Path,
    stage: Path,
    stack: ExitStack,
    manifest: ManifestDocument,
    base: Base,
    group: Sequence[str],
    outcome: Several,
    progress: Progress,
    hasher: Any,
) -> Iterator[_Candidate]:
    """Every adapter of a group that can be written, in the staging folder."""
    switchable = switchable_part(folder, manifest)
    slots = [Slot.from_dict(entry) for entry in switchable.slots]
    shares = {gate.site: gate.weight for gate in gates_of(manifest) if gate.weight is not None}
    names_in_use = set(switchable.adapters)
    (stage / FOLDER).mkdir()
    with progress.stage("writing adapters", len(group), "adapters") as advance:
        for source in group:
            name = source
            try:
                spec = _named(source)
                name = spec.name
                if name in names_in_use:
                    raise OutputError(
                        f"{folder}: adapter {name}", "exists", "a new name",
                        "add it by itself, with --name",
                    )  # fmt: skip
                plan = plan_with(manifest, base, spec)
                check_finite(plan, Silent())
                inputs = input_entries(manifest, plan, Silent(), hasher)
                folders = stack.enter_context(oracle_folders(plan))
                version = switchable.model_version
                entry, _ = add_adapter_file(stage, slots, plan.adapters[0], version, shares)
                names_in_use.add(name)
                yield _Candidate(spec, plan, folders, entry, inputs)
            except MachineError:
                raise  # the next one would meet it, too
            except AdaptrixError as error:
                outcome.left_out.append(LeftOut(name, source, error))
            advance(1)


def _named(source: str) -> AdapterSpec:
    """The adapter of a source, named after it. Raises SourceError where that is no name."""
    try:
        return AdapterSpec.model_validate({"source": source})
    except ValidationError as error:
        raise SourceError(
            source, "no name for an adapter", "letters, digits, '.', '_' and '-'",
            "add it by itself, with --name",
        ) from error  # fmt: skip


def _proved(
    folder: Path,
    stage: Path,
    manifest: ManifestDocument,
    made: Sequence[_Candidate],
    level: str,
    outcome: Several,
    progress: Progress,
) -> list[_Candidate]:
    """Those that passed, each with its report; all of them with parity off."""
    if level == "off" or not made:
        return list(made)
    request = proof_request(folder, stage, manifest, level)
    reports = prove_each({m.spec.name: request.job(m.plan, m.folders) for m in made}, progress)
    passed = []
    for one in made:
        report = reports[one.spec.name]
        error = _failure(folder, report)
        if error is not None:
            outcome.left_out.append(LeftOut(one.spec.name, one.spec.source, error))
            continue
        one.report = with_plan(report, one.plan)
        passed.append(one)
    return passed


def _failure(folder: Path, report: dict[str, Any]) -> AdaptrixError | None:
    if "error" in report:
        parts = report["error"]
        kind = getattr(errors, parts["error"])
        error: AdaptrixError = kind(*(parts[k] for k in ("place", "found", "expected", "remedy")))
        return error
    if report["passed"]:
        return None
    failure = ParityError(
        str(folder), summary(ReportDocument.of(report)), "parity", "it was left out"
    )
    failure.report = report
    return failure


def _publish(
    folder: Path,
    stage: Path,
    manifest: ManifestDocument,
    proved: Sequence[_Candidate],
    outcome: Several,
    page: PageWriter | None,
) -> None:
    """Move a group's files into the artifact, the manifest that names them last."""
    files: list[str] = []
    added = []
    for one in proved:
        one.entry["parity"] = "proved" if one.report else "unverified"
        own = [one.entry["file"]]
        if one.report:
            own.append(f"{FOLDER}/{one.spec.name}.report.json")
            save(one.report, stage / own[-1])
        outputs = {file: file_entry(stage / file) for file in own}
        manifest = extended(manifest, one.spec, one.plan, one.entry, outputs, one.inputs)
        files += own
        added.append(Added(one.spec.name, folder / one.entry["file"], one.entry, one.report))
    if added:
        if page is not None:
            manifest, pages = page(stage, folder, manifest)
            files += pages
        write_manifest(stage, manifest.as_dict())
        install(stage, folder, [*files, MANIFEST])
        outcome.added += added
