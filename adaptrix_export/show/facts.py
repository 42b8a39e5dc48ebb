"""The one place where a page, a card or a table reads manifest.json and report.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.package.documents import (
    CaseEntry,
    ConflictsEntry,
    EffectEntry,
    FidelityEntry,
    ManifestDocument,
    ReportDocument,
    parse_document,
)
from adaptrix_export.package.manifest import read_manifest

REPORT = "report.json"
# `model.layers.7.self_attn.q_proj.weight`: the first number is the layer's.
_LAYER = re.compile(r"^(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<module>.+)$")
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")  # of hundreds of experts the page shows one row


@dataclass(frozen=True)
class Place:
    """A parameter's place on the picture: its stack, layer (None: outside) and module."""

    stack: str
    layer: int | None
    module: str

    @classmethod
    def of(cls, name: str) -> Place:
        """The place of a site's path or of a parameter's name."""
        path = name.removesuffix(".weight")
        match = _LAYER.match(path)
        if match is None:
            return cls("", None, path)
        return cls(match["stack"], int(match["layer"]), _EXPERT.sub("*", match["module"]))


@dataclass(frozen=True)
class Facts:
    """An artifact as its manifest and report describe it.

    `report` is None for an artifact that was built with parity off. `timings` are those of the
    build, where this machine made it: a page inside an artifact has none, because the same inputs
    give the same bytes.
    """

    name: str
    manifest: ManifestDocument
    report: ReportDocument | None
    timings: Mapping[str, Any] | None = field(default=None)

    @property
    def title(self) -> str:
        """What it is, by its inputs: the same wherever the artifact lies."""
        names = self.adapters if len(self.adapters) <= 3 else [f"{len(self.adapters)} adapters"]
        return f"{', '.join(names)} on {_last_part(str(self.manifest.recipe['base']))}"

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def task(self) -> str:
        """The task of the proof, or what the recipe says where there was none."""
        if self.report is not None:
            return self.report.task
        task = str(self.manifest.recipe.get("task", "auto"))
        return "text-generation" if task == "auto" else task

    @property
    def proved(self) -> bool:
        return self.manifest.parity.verdict == "proved"

    @property
    def outputs(self) -> dict[str, int]:
        """File name -> bytes, largest first."""
        sizes = {name: file.bytes for name, file in self.manifest.outputs.items()}
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def total_bytes(self) -> int:
        return sum(self.outputs.values())

    @property
    def adapters(self) -> list[str]:
        return [str(adapter["name"]) for adapter in self.manifest.recipe["adapters"]]

    @property
    def switchable(self) -> bool:
        return self.target == "onnx-switchable"

    @property
    def graph(self) -> str | None:
        """The graph that a client opens; None where the artifact has no graph."""
        names = [n for n in self.outputs if n.endswith(".onnx")]
        usual = (
            "onnx/model.onnx", "model.onnx", "onnx/decoder_model_merged.onnx",
            "decoder_model_merged.onnx",
        )  # fmt: skip
        return next((name for name in usual if name in names), names[0] if names else None)

    @cached_property
    def cases(self) -> list[CaseEntry]:
        return self.report.cases if self.report else []

    @cached_property
    def worst_case(self) -> CaseEntry | None:
        """The case that came nearest to its bound."""
        return max(self.cases, key=bound_share, default=None)

    @property
    def fidelity(self) -> dict[str, FidelityEntry]:
        """What redistributed adapters kept; in the manifest alone where parity was off."""
        return (self.report.fidelity if self.report else {}) or self.manifest.fidelity

    @property
    def effect(self) -> EffectEntry | None:
        return self.report.effect if self.report else None

    @property
    def conflicts(self) -> ConflictsEntry | None:
        return self.report.conflicts if self.report else None


def _last_part(spec: str) -> str:
    """`hf:org/name@revision` and `path:name` -> name; `package:NAME/FILE` -> the file's stem."""
    tail = spec.partition(":")[2] or spec
    return tail.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def bound_share(case: CaseEntry) -> float:
    """The largest difference as a share of what is allowed; infinite where it is not finite."""
    allowed = case.tolerance.max_abs
    if case.max_abs is None:
        return float("inf")
    return case.max_abs / allowed if allowed else (0.0 if case.max_abs == 0 else float("inf"))


def read_facts(folder: Path, timings: Mapping[str, Any] | None = None) -> Facts:
    """The facts of a published artifact. Raises SourceError for a folder that is none."""
    manifest = read_manifest(folder)
    path = folder / REPORT
    report = None
    if path.is_file():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(
                str(path), f"not JSON ({error})", "a parity report", "build again"
            ) from error
        report = parse_document(ReportDocument, document, str(path))
    return Facts(folder.resolve().name, manifest, report, timings)
