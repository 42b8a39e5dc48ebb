"""Tells exceptions of the libraries that build or run a graph from those of this package.

An exception of mobius-onnx, torch.export or ONNX Runtime says that they cannot handle the model;
one of our own code is a bug, and must not count as a verdict on a front end.
"""

from __future__ import annotations

import traceback
from pathlib import PurePath

# Packages that build, trace, convert or run a graph, by the folder of their modules.
THEIRS = frozenset({"mobius", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch",
                    "transformers"})  # fmt: skip
# By front end: the remedy when it cannot build a model's graph.
REMEDIES = {
    "native": "build with --frontend traced, or use --target safetensors",
    "traced": "use --target safetensors",
}
OURS = PurePath(__file__).parents[2]


def raised_by(error: BaseException) -> str | None:
    """The package of `THEIRS` whose code raised an exception, or called what raised it.

    None if it was code of this package. The innermost frame that belongs to either decides, since
    both call numpy and the standard library.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = PurePath(frame.filename)
        if path.is_relative_to(OURS):
            return None
        named = next((part for part in reversed(path.parts[:-1]) if part in THEIRS), None)
        if named is not None:
            return named
    return None
