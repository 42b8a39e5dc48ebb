"""Whose fault an exception is: that of a library that draws or runs a graph, or our own.

A refusal of a model by mobius-onnx, by torch.export or by ONNX Runtime says something about the
model; a slip in our own code says nothing, and must not pass for a verdict on a front end.
"""

from __future__ import annotations

import traceback
from pathlib import PurePath

# Packages that build, trace, convert or run a graph, by the folder of their modules.
THEIRS = frozenset({"mobius", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch",
                    "transformers"})  # fmt: skip
# By front end: what to do where it cannot draw a model.
REMEDIES = {
    "native": "build with --frontend traced, or use --target safetensors",
    "traced": "use --target safetensors",
}
OURS = PurePath(__file__).parents[2]


def raised_by(error: BaseException) -> str | None:
    """The package of `THEIRS` whose code raised an exception, or called what raised it.

    None where code of ours did: the innermost frame that belongs to them or to us decides, since
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
