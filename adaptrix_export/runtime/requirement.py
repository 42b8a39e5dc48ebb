"""Whether the ONNX Runtime at hand is new enough for an artifact, before it is asked to load it.

Its own words about a graph that is too new name opsets and operators, and no version of itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import MANIFEST, read_object

OLDEST = "1.20"  # what a session asks for itself: the format of adapter files came with it


def check_runtime(graph: Path, version: str) -> None:
    """Raise SourceError where a graph needs a newer ONNX Runtime than `version`."""
    minimum = minimum_runtime(graph)
    if minimum is not None and _release(version) < _release(minimum):
        raise SourceError(
            f"onnxruntime {version}", "this ONNX Runtime is too old",
            f"{minimum} or newer, which {graph} needs",
            f"pip install --upgrade 'onnxruntime>={minimum}'",
        )  # fmt: skip


def minimum_runtime(graph: Path) -> str | None:
    """The oldest ONNX Runtime that a session loads a graph in, as its manifest says: `1.20`.

    None without a manifest in the graph's folder or the one above, and for a manifest that says
    nothing of it.
    """
    places = (graph.parent / MANIFEST, graph.parent.parent / MANIFEST)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    needs = read_object(path).get("onnxruntime")
    minimum = needs.get("minimum") if isinstance(needs, dict) else None
    if not isinstance(minimum, str) or not re.fullmatch(r"\d+\.\d+", minimum):
        return None
    return max(minimum, OLDEST, key=_release)


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers: `1.18` of `1.18.1+cpu`."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
