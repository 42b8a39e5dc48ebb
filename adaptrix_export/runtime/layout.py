"""Where an artifact's graphs lie: in `onnx/` (layout hub) or in the folder itself (layout flat)."""

from __future__ import annotations

from pathlib import Path

ONNX_FOLDER = "onnx"


def located(folder: Path, file: str) -> Path:
    """The path of a graph by its file name, in whichever layout the artifact has.

    A graph that is in neither place is expected in the folder itself.
    """
    inner = folder / ONNX_FOLDER / file
    return inner if inner.is_file() else folder / file
