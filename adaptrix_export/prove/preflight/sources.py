"""What a verdict on a front end depends on: our own sources, and the versions of libraries."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adaptrix_export import __version__

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "accelerate", "ml_dtypes", "mobius-onnx", "numpy", "onnx", "onnx-ir", "onnx-shape-inference",
    "onnxruntime", "onnxruntime-gpu", "onnxscript", "peft", "safetensors", "sympy",
    "torch", "transformers",
)  # fmt: skip


@cache  # once a process: sources do not change under it
def sources_hash(root: Path = ROOT) -> str:
    """sha256 of every module of the package, by path and content."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}:{len(content)}\n".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of all that takes part, as far as it is installed."""
    versions = {"adaptrix-export": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # only one of the two ONNX Runtime packages is ever installed
    return versions
