"""The page's way to the disk: into an artifact that is being staged, or beside one."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from adaptrix_export.errors import OutputError
from adaptrix_export.package.documents import File, ManifestDocument, ReportDocument
from adaptrix_export.save.hashes import hash_file
from adaptrix_export.show.facts import Facts, read_facts
from adaptrix_export.show.page import PAGE, report_page

ARTIFACT = "artifact"  # in the code to copy: the page must not depend on where it will lie


def stage_page(
    folder: Path, manifest: ManifestDocument, report: ReportDocument | None
) -> ManifestDocument:
    """Write the page of a staged artifact; returns the manifest with the page among its outputs.

    The page lists every file but itself.
    """
    others = {name: file for name, file in manifest.outputs.items() if name != PAGE}
    facts = Facts(ARTIFACT, manifest.model_copy(update={"outputs": others}), report)
    path = folder / PAGE
    path.write_text(report_page(facts), encoding="utf-8", newline="\n")
    written = hash_file(path)
    outputs = {**others, PAGE: File(bytes=written.bytes, sha256=written.sha256)}
    return manifest.model_copy(update={"outputs": dict(sorted(outputs.items()))})


def renew_page(
    stage: Path, folder: Path, manifest: ManifestDocument
) -> tuple[ManifestDocument, list[str]]:
    """The page of an artifact whose manifest is about to change, staged; see `add_adapter`.

    An artifact that was built without one stays without.
    """
    if PAGE not in manifest.outputs:
        return manifest, []
    return stage_page(stage, manifest, read_facts(folder).report), [PAGE]


def write_page(text: str, path: Path) -> Path:
    """A page at a place of one's own. Raises OutputError where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            str(path), f"cannot be written ({error.strerror})", "a new file", "pick another --out"
        ) from error
    return path.resolve()


def open_page(path: Path) -> bool:
    """Show it in the browser; False where there is none."""
    return webbrowser.open(path.resolve().as_uri())
