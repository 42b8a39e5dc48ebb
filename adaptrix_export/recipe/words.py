"""Enumerations of a recipe."""

from __future__ import annotations

from enum import Enum


class Word(str, Enum):
    """A string enumeration whose `str()` is its value on every Python version."""

    def __str__(self) -> str:
        return str(self.value)


class Frontend(Word):
    AUTO = "auto"
    NATIVE = "native"
    TRACED = "traced"


class Task(Word):
    """`auto`, and the rows of `arch/task_table.py`."""

    AUTO = "auto"
    TEXT_GENERATION = "text-generation"
    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105  # a task, no password
    TEXT2TEXT_GENERATION = "text2text-generation"
    FILL_MASK = "fill-mask"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"
    AUTOMATIC_SPEECH_RECOGNITION = "automatic-speech-recognition"
    AUDIO_CLASSIFICATION = "audio-classification"
    AUDIO_FRAME_CLASSIFICATION = "audio-frame-classification"
    AUDIO_XVECTOR = "audio-xvector"
    TEXT_TO_AUDIO = "text-to-audio"
    IMAGE_CLASSIFICATION = "image-classification"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    SEMANTIC_SEGMENTATION = "semantic-segmentation"
    IMAGE_SEGMENTATION = "image-segmentation"
    OBJECT_DETECTION = "object-detection"
    ZERO_SHOT_OBJECT_DETECTION = "zero-shot-object-detection"
    DEPTH_ESTIMATION = "depth-estimation"
    MASK_GENERATION = "mask-generation"
    MASKED_IM = "masked-im"
    IMAGE_TO_IMAGE = "image-to-image"
    KEYPOINT_DETECTION = "keypoint-detection"
    VIDEO_CLASSIFICATION = "video-classification"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"
    VISUAL_QUESTION_ANSWERING = "visual-question-answering"
    DOCUMENT_QUESTION_ANSWERING = "document-question-answering"
    TIME_SERIES_PREDICTION = "time-series-prediction"
    AS_SAVED = "as-saved"


class Pooling(Word):
    NONE = "none"
    AUTO = "auto"
    MEAN = "mean"
    CLS = "cls"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    WEIGHTEDMEAN = "weightedmean"
    LASTTOKEN = "lasttoken"


class Layout(Word):
    HUB = "hub"
    FLAT = "flat"


class Provider(Word):
    CPU = "cpu"


class BaseWeights(Word):
    AUTO = "auto"
    DEQUANTIZED = "dequantized"
    ORIGINAL = "original"


class Simulate(Word):
    NF4 = "nf4"
    NF4_DOUBLE = "nf4-double"
    FP4 = "fp4"  # known, and refused


class Precision(Word):
    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Method(Word):
    AUTO = "auto"
    GPTQ = "gptq"
    RTN = "rtn"
    LOSSLESS = "lossless"


class Scales(Word):
    FP16 = "fp16"
    FP32 = "fp32"


class Approximation(Word):
    SVD = "svd"


class AdaptrixScaling(Word):
    ALPHA_OVER_RANK = "alpha_over_rank"
    STORED = "stored"
    ONE = "one"


class OnMismatch(Word):
    ERROR = "error"
    DROP = "drop"


class TokenizerFrom(Word):
    AUTO = "auto"
    BASE = "base"
    ADAPTER = "adapter"


class Strategy(Word):
    SELECT = "select"
    FOLD = "fold"
    FIT = "fit"
    DISTILL = "distill"


class Election(Word):
    TOTAL = "total"
    FREQUENCY = "frequency"


class ContextMode(Word):
    CLAMP = "clamp"
    MASK = "mask"
    BLEND = "blend"


class ContextScope(Word):
    SITE = "site"
    LAYER = "layer"


class ParityLevel(Word):
    FULL = "full"
    FAST = "fast"
    OFF = "off"


# What the section `quantize` goes with.
QUANTIZED = (Precision.INT8, Precision.INT4)
# Matrices of 16 bits, computed with in float32.
HALVES = (Precision.FP16, Precision.BF16)


class LongPrompts(Word):
    AUTO = "auto"
    ON = "on"
    OFF = "off"
