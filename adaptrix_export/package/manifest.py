"""manifest.json: what went in, what came out, and what was proved, by hash.

Two builds of the same recipe with the same versions give the same manifest, so it holds no clock
and no path of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from adaptrix_export import __version__
from adaptrix_export.errors import MachineError, SourceError, VerificationError
from adaptrix_export.load.base_weights import weights_record
from adaptrix_export.load.files.regular import require_regular
from adaptrix_export.package.documents import MANIFEST_FORMAT, ManifestDocument, parse_document
from adaptrix_export.runtime.files import CHECKSUM, MANIFEST, manifest_text
from adaptrix_export.save.hashes import (
    FileHash,
    InputFile,
    files_under,
    hash_file,
    hash_folder,
    odd_entries,
)
from adaptrix_export.save.machine_paths import without_machine_paths

if TYPE_CHECKING:
    from adaptrix_export.plan import Plan
    from adaptrix_export.targets.artifact import Artifact

FORMAT = MANIFEST_FORMAT
TOOL = "adaptrix-export"

# Whose versions decide the bytes. The two builds of ONNX Runtime exclude each other.
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "mobius-onnx",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class Problem:
    """One way in which a folder is not what its manifest says."""

    file: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.found}, expected {self.expected}"


def build_manifest(
    artifact: Artifact,
    plan: Plan,
    *,
    recipe: Mapping[str, Any],
    inputs: Iterable[InputFile],
    provider: str | None,
    parity: str,
    report_sha256: str | None,
) -> dict[str, Any]:
    """The manifest of all that lies in `artifact.folder` now, each file read back and hashed.

    `parity` is "proved" or "unverified"; `report_sha256` is the hash of report.json, if any.
    Raises MachineError if a file no longer holds what lowering wrote.
    """
    from adaptrix_export.package.runtime_needs import runtime_needs  # imports onnx_ir

    return {
        "format": FORMAT,
        "tool": {"name": TOOL, "version": __version__},
        "target": artifact.target,
        "frontend": artifact.frontend,
        "frontend_reason": artifact.frontend_reason,
        "provider": provider,
        "precision": artifact.precision,
        **({"onnxruntime": needs} if (needs := runtime_needs(artifact.folder)) else {}),
        # Where the artifact goes does not change it.
        "recipe": without_machine_paths({k: v for k, v in recipe.items() if k != "out"}),
        "inputs": [
            {"spec": without_machine_paths(i.spec), "file": i.file, **i.hash.as_dict()}
            for i in inputs
        ],
        "outputs": {name: h.as_dict() for name, h in _read_back(artifact).items()},
        "versions": library_versions(),
        "history": list(plan.history),
        **({"composition": plan.composition.as_dict()} if plan.composition else {}),
        **({"fidelity": plan.measured["fidelity"]} if "fidelity" in plan.measured else {}),
        "adjustments": [asdict(adjustment) for adjustment in plan.adjustments],
        "base_weights": weights_record(plan.base),
        "context": _context(plan),
        "sites": [site.path for site in plan.sites()],
        "untied": list(artifact.untied),
        "weights": {name: e.as_json() for name, e in artifact.weights.items()},
        **({"quantized": dict(artifact.quantized)} if artifact.quantized else {}),
        **({"kept_float": dict(artifact.kept_float)} if artifact.quantized else {}),
        **({"switchable": dict(artifact.switchable)} if artifact.switchable else {}),
        "parity": {"verdict": parity, "report_sha256": report_sha256},
    }


def _context(plan: Plan) -> dict[str, Any] | None:
    """The gates, in the order of the statistics; None without any."""
    if not plan.gates:
        return None
    gates = sorted(plan.gates, key=lambda gate: gate.site.order)
    return {
        "stats": plan.gate_stats,
        "gates": [
            {"site": g.site.path, "mode": g.mode, "tau": g.tau, "weight": g.weight} for g in gates
        ],
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, keys sorted, with a checksum of itself."""
    (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")


def read_manifest(folder: Path) -> ManifestDocument:
    """The manifest of a published artifact, its fields of the types that they should have.

    Raises SourceError if there is none that we know, VerificationError for one that was edited.
    """
    return parse_document(ManifestDocument, _read_known(folder), str(folder / MANIFEST))


def _read_known(folder: Path) -> dict[str, Any]:
    """A manifest of a version that we know; its fields may be anything."""
    path = folder / MANIFEST
    if not path.is_file():
        raise SourceError(
            str(folder),
            f"no {MANIFEST}",
            "an artifact folder",
            "name a folder that `adaptrix-export build` made",
        )
    try:
        require_regular(path)
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(str(path), f"not JSON ({error})", "a manifest", "build again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise SourceError(
            str(path),
            f"manifest format {version!r}",
            f"format {FORMAT}",
            "use the adaptrix-export that built it, or build again",
        )
    if text != manifest_text(manifest):
        raise VerificationError(
            str(path), f"not what its {CHECKSUM} says", "the manifest as it was written",
            "it was edited or damaged; build again",
        )  # fmt: skip
    return {key: value for key, value in manifest.items() if key != CHECKSUM}


def check_hashes(folder: Path) -> list[Problem]:
    """Every file that is missing, changed or not listed; an empty list means all is as built.

    Raises SourceError for a folder without a readable manifest, or with one whose names lead out
    of the folder.
    """
    listed = dict(_listed(folder, _read_known(folder)))
    odd = {
        name: what
        for name, what in odd_entries(folder)
        if not any(file.startswith(f"{name}/") for file in listed)  # its files are missed below
    }
    present = {
        name: path
        for name, path in files_under(folder)
        if name != MANIFEST and not any(name == o or name.startswith(f"{o}/") for o in odd)
    }
    problems = [
        Problem(name, what, "a file" if name in listed else "nothing of that kind")
        for name, what in sorted(odd.items())
    ]
    for name in sorted(listed.keys() | present.keys()):
        if name in odd:
            continue
        if name not in present:
            problems.append(Problem(name, "missing", "a file"))
        elif name not in listed:
            problems.append(Problem(name, "present", "no such file by the manifest"))
        else:
            problems += _compare(name, listed[name], hash_file(present[name]))
    return problems


def _compare(name: str, expected: FileHash, actual: FileHash) -> list[Problem]:
    if actual.bytes != expected.bytes:
        return [Problem(name, f"{actual.bytes} bytes", f"{expected.bytes} bytes")]
    if actual.sha256 != expected.sha256:
        return [Problem(name, f"sha256 {actual.sha256}", expected.sha256)]
    return []


def _listed(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, FileHash]]:
    outputs = manifest.get("outputs")
    if not isinstance(outputs, dict):
        raise SourceError(str(folder / MANIFEST), "no outputs", "file name -> hash", "build again")
    for name, entry in outputs.items():
        fields = entry if isinstance(entry, dict) else {}
        size, digest = fields.get("bytes"), fields.get("sha256")
        if not _stays_inside(name) or not isinstance(size, int) or not isinstance(digest, str):
            raise SourceError(
                str(folder / MANIFEST),
                f"outputs names {name!r}: {entry!r}",
                "a relative file name with bytes and sha256",
                "do not trust this folder; build again",
            )
        yield name, FileHash(size, digest)


def _stays_inside(name: str) -> bool:
    """Whether a manifest's file name is relative and leads nowhere else, on any system."""
    if not name or "\\" in name or "\0" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


def _read_back(artifact: Artifact) -> dict[str, FileHash]:
    """Hashes of the staged files; those that lowering hashed while writing must agree."""
    hashes = hash_folder(artifact.folder, skip=frozenset({MANIFEST}))
    for name, written in artifact.hashes.items():
        if name not in hashes or hashes[name].sha256 != written:
            raise MachineError(
                name,
                f"reads back as {hashes[name].sha256 if name in hashes else 'missing'}",
                f"{written} as written",
                "check the disk and build again",
            )
    return hashes


def library_versions() -> dict[str, str]:
    """Of those libraries that decide what an artifact is, and that are installed."""
    return {name: v for name in LIBRARIES if (v := _version(name)) is not None}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
