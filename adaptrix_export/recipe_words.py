"""The words that a recipe chooses among."""

from __future__ import annotations

from enum import Enum


class _Word(str, Enum):
    """One of a few words; prints as the word, on every Python."""

    def __str__(self) -> str:
        return str(self.value)


class Target(_Word):
    ONNX = "onnx"
    SAFETENSORS = "safetensors"


class Frontend(_Word):
    AUTO = "auto"
    NATIVE = "native"


class Task(_Word):
    AUTO = "auto"
    TEXT_GENERATION = "text-generation"
    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105  # a task, no password


class Provider(_Word):
    CPU = "cpu"


class BaseWeights(_Word):
    AUTO = "auto"
    DEQUANTIZED = "dequantized"
    ORIGINAL = "original"


class Simulate(_Word):
    NF4 = "nf4"
    NF4_DOUBLE = "nf4-double"
    FP4 = "fp4"  # known, and refused


class Precision(_Word):
    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class AdaptrixScaling(_Word):
    ALPHA_OVER_RANK = "alpha_over_rank"
    STORED = "stored"
    ONE = "one"


class OnMismatch(_Word):
    ERROR = "error"
    DROP = "drop"


class ParityLevel(_Word):
    FULL = "full"
    FAST = "fast"
    OFF = "off"


# What each target can be written in today; the other words are known, and refused.
PRECISIONS: dict[Target, tuple[Precision, ...]] = {
    Target.ONNX: (Precision.AUTO, Precision.FP32),
    Target.SAFETENSORS: (Precision.AUTO,),
}
