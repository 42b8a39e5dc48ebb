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
    manifest: Mapping[str, Any]
    report: Mapping[str, Any] | None
    timings: Mapping[str, Any] | None = field(default=None)

    @property
    def title(self) -> str:
        """What it is, by its inputs: the same wherever the artifact lies."""
        names = self.adapters if len(self.adapters) <= 3 else [f"{len(self.adapters)} adapters"]
        return f"{', '.join(names)} on {_last_part(str(self.manifest['recipe']['base']))}"

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @property
    def task(self) -> str:
        """The task of the proof, or what the recipe says where there was none."""
        if self.report is not None:
            return str(self.report.get("task", "text-generation"))
        asked = str(self.manifest["recipe"].get("task", "auto"))
        return "text-generation" if asked == "auto" else asked

    @property
    def proved(self) -> bool:
        return bool(self.manifest["parity"]["verdict"] == "proved")

    @property
    def outputs(self) -> dict[str, int]:
        """File name -> bytes, largest first."""
        sizes = {name: int(entry["bytes"]) for name, entry in self.manifest["outputs"].items()}
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def total_bytes(self) -> int:
        return sum(self.outputs.values())

    @property
    def adapters(self) -> list[str]:
        return [str(adapter["name"]) for adapter in self.manifest["recipe"]["adapters"]]

    @property
    def switchable(self) -> bool:
        return self.target == "onnx-switchable"

    @property
    def graph(self) -> str | None:
        """The graph that a client opens; None where the artifact has no graph."""
        names = [n for n in self.outputs if n.endswith(".onnx")]
        wanted = (
            "onnx/model.onnx", "model.onnx", "onnx/decoder_model_merged.onnx",
            "decoder_model_merged.onnx",
        )  # fmt: skip
        return next((name for name in wanted if name in names), names[0] if names else None)

    @cached_property
    def cases(self) -> list[Mapping[str, Any]]:
        return list(self.report["cases"]) if self.report else []

    @cached_property
    def worst_case(self) -> Mapping[str, Any] | None:
        """The case that came nearest to its bound."""
        return max(self.cases, key=bound_share, default=None)

    def section(self, name: str) -> Any:
        """A section that a pass or a check measured, from the report or else from the manifest."""
        found = (self.report or {}).get(name)
        return self.manifest.get(name) if found is None else found


def _last_part(spec: str) -> str:
    """`hf:org/name@revision` and `path:name` -> name; `package:NAME/FILE` -> the file's stem."""
    tail = spec.partition(":")[2] or spec
    return tail.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def bound_share(case: Mapping[str, Any]) -> float:
    """The largest difference as a share of what is allowed; infinite where it is not finite."""
    found, allowed = case["max_abs"], case["tolerance"]["max_abs"]
    if found is None:
        return float("inf")
    return float(found) / float(allowed) if allowed else (0.0 if found == 0 else float("inf"))


def read_facts(folder: Path, timings: Mapping[str, Any] | None = None) -> Facts:
    """The facts of a published artifact. Raises SourceError for a folder that is none."""
    manifest = read_manifest(folder)
    path = folder / REPORT
    report = None
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(
                str(path), f"not JSON ({error})", "a parity report", "build again"
            ) from error
    return Facts(folder.resolve().name, manifest, report, timings)
