"""Check an artifact that was published before: its bytes, then its parity, again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError, VerificationError
from adaptrix_export.load import Reading, open_adapter
from adaptrix_export.load.base_weights import AUTO, open_bases
from adaptrix_export.load.fit.mismatch import fitted
from adaptrix_export.load.text import read_text
from adaptrix_export.manage.places import found_again
from adaptrix_export.package import InputHashes, check_hashes, read_manifest
from adaptrix_export.package.documents import BuiltRecipe, ManifestDocument, parse_document
from adaptrix_export.package.redistributed import kept_plan, of_peft_folder
from adaptrix_export.passes.approximate import Approximate
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.reference_plan import reference_plan
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.proof import ProofRequest, proof_of, require_passed
from adaptrix_export.recipe.targets import Form, facts_of
from adaptrix_export.runtime.files import MANIFEST
from adaptrix_export.save.staging import finish_addition

REPROVED, HASHES_ONLY, NEVER_PROVED = "re-proved", "hashes only", "never proved"
READING = ("allow_pickle", "adaptrix_scaling")  # fields of a recipe


def verify_artifact(
    folder: Path,
    progress: Progress | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """`{"files": n, "proof": words, "parity": report or None, "note": why there is no report}`.

    The words are `REPROVED`, `HASHES_ONLY` (parity was proved when it was built) or `NEVER_PROVED`.
    `base` and `adapters` say where the originals are now; by default they are looked for where the
    recipe in the manifest says, and where this machine remembers them. Parity is left out only if
    nothing was named and they are not there. Raises VerificationError for bytes that changed,
    ParityError for a failed proof.
    """
    progress = progress or Silent()
    finish_addition(folder)
    manifest = read_manifest(folder)
    with progress.stage("hashes"):
        problems = check_hashes(folder)
    if problems:
        first, more = problems[0], len(problems) - 1
        raise VerificationError(
            f"{folder}: {first.file}", first.found, first.expected,
            f"{more} more such files; build it again" if more else "build it again",
        )  # fmt: skip
    parse_document(BuiltRecipe, manifest.recipe, f"{folder / MANIFEST}: recipe")
    proved_once = manifest.parity.verdict == "proved"
    result: dict[str, Any] = {
        "files": len(manifest.outputs), "proof": HASHES_ONLY if proved_once else NEVER_PROVED,
        "parity": None, "note": None,
    }  # fmt: skip
    try:
        plan = _originals(manifest, base, adapters, folder)
    except SourceError as error:
        if base or adapters:
            raise
        return {**result, "note": f"parity was not checked again: {error}"}
    _check_inputs(manifest, plan, progress)
    as_published = kept_plan(plan, folder)
    if facts_of(manifest.target).form is Form.ADAPTER:
        as_published = of_peft_folder(plan, manifest, folder)
    slots = manifest.recipe.get("slots") or {}
    request = ProofRequest.of_manifest(folder, manifest, _text(manifest))
    with pass_context(progress) as context:
        reference = reference_plan(
            as_published, Approximate(slots.get("rank"), context)(as_published)
        )
        report = proof_of(request, reference, progress)
    require_passed(report, str(folder), "build it again")
    return {**result, "proof": REPROVED, "parity": report}


def _text(manifest: ManifestDocument) -> str | None:
    """The recipe's own text for the proof, where its file still is; else the built-in one."""
    place = manifest.recipe["parity"].get("text")
    if place is None or not Path(place).is_file():
        return None
    return read_text(place, "parity.text")


def _originals(
    manifest: ManifestDocument, base: str | None, adapters: Sequence[str], folder: Path
) -> Plan:
    recipe = found_again(manifest.recipe, folder)
    named = [(a["name"], a["source"]) for a in recipe["adapters"]]
    if adapters:
        if len(adapters) != len(named):
            raise SourceError(
                "--adapter", f"{len(adapters)} of them", f"{len(named)}, as in the manifest"
            )
        named = [(name, spec) for (name, _), spec in zip(named, adapters, strict=True)]
    specs = [spec for _, spec in named]
    # --base names the very weights merged into; the others are then left out of the report.
    opened, other = open_bases(
        base or recipe["base"],
        recipe.get("base_weights", AUTO),
        recipe.get("simulate"),
        None if base else recipe.get("original_base"),
        task=recipe.get("task", "auto"),
        adapters=specs,
    )
    # Artifacts of before these fields were read with their defaults.
    reading = Reading(**{k: recipe[k] for k in READING if k in recipe})
    loaded = tuple(open_adapter(spec, opened, name, reading) for name, spec in named)
    return fitted(Plan(opened, loaded, alternative=other), recipe.get("on_mismatch", "error"))


def _check_inputs(manifest: ManifestDocument, plan: Plan, progress: Progress) -> None:
    """The originals at hand must be those that the artifact was made from."""
    with progress.stage("originals"):
        files = [(i.file, i.hash.sha256) for i in InputHashes(plan).result()]
    expected = [(i.file, i.sha256) for i in manifest.inputs]
    if files != expected:
        wrong = next((f for f, e in zip(files, expected, strict=False) if f != e), ("files", ""))
        raise VerificationError(
            wrong[0], "another file than the artifact was built from", "the original",
            "name the originals with --base and --adapter",
        )  # fmt: skip
