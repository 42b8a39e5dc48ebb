"""Facts about each target that are needed before a build: one row for each target.

How a target is written and read back is its row in `targets.TARGETS`; its form decides which
runtime the parity check uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from adaptrix_export.recipe.words import HALVES, QUANTIZED, ContextMode, Precision, Word


class Target(Word):
    ONNX = "onnx"
    ONNX_SWITCHABLE = "onnx-switchable"
    SAFETENSORS = "safetensors"
    PEFT = "peft"


class Form(Enum):
    """The form of an artifact: which library loads it, and its further files."""

    GRAPH = "a graph for ONNX Runtime"
    CHECKPOINT = "a checkpoint for transformers"
    ADAPTER = "an adapter for PEFT"


@dataclass(frozen=True)
class TargetFacts:
    """`composes`: several adapters become one; otherwise each has its own file, for slots.

    `context_modes`: the supported gates; weights can express `blend` only. `precisions`: supported
    number formats; others are refused.
    """

    form: Form
    composes: bool
    context_modes: tuple[ContextMode, ...]
    precisions: tuple[Precision, ...]


def facts_of(target: str) -> TargetFacts:
    """The row of a target by its word, as manifests and proofs name it."""
    return TARGET_FACTS[Target(target)]


_GRAPHS = (Precision.AUTO, Precision.FP32, *HALVES, *QUANTIZED)

TARGET_FACTS: dict[Target, TargetFacts] = {
    Target.ONNX: TargetFacts(Form.GRAPH, True, tuple(ContextMode), _GRAPHS),
    Target.ONNX_SWITCHABLE: TargetFacts(Form.GRAPH, False, tuple(ContextMode), _GRAPHS),
    Target.SAFETENSORS: TargetFacts(Form.CHECKPOINT, True, (ContextMode.BLEND,), (Precision.AUTO,)),
    Target.PEFT: TargetFacts(Form.ADAPTER, True, (ContextMode.BLEND,), (Precision.AUTO,)),
}
