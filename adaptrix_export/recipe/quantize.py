"""The recipe's section `quantize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adaptrix_export.recipe.redistribute import CalibrationText
from adaptrix_export.recipe.sections import Line, Section
from adaptrix_export.recipe.words import Method, Scales

Bits = Literal[4, 8]


class Quantize(Section):
    """How weights of 4 or 8 bits are made; `precision` int4 or int8 asks for them."""

    method: Method = Field(
        default=Method.AUTO,
        description="gptq: codes chosen under the second moments of each layer's inputs on "
        "calibration text; rtn: rounded to nearest, without any text; lossless: a GGUF base in "
        "Q4_0, Q4_1 or Q8_0 keeps its codes, for onnx-switchable; auto: gptq for int4, rtn for "
        "int8.",
    )
    block: Literal[16, 32, 64, 128, 256] = Field(
        default=32,
        description="Inputs that share a scale. 32 loses least; 128 is fastest on a CPU.",
    )
    symmetric: bool = Field(
        default=True,
        strict=True,
        description="Without zero points; with them, int4 loses less and takes 3% more.",
    )
    scales: Scales = Field(
        default=Scales.FP16, description="How scales are stored; fp32 gains nothing on a CPU."
    )
    embedding: Literal[4, 8, "float"] = Field(
        default=8,
        description="Bits of the embedding and the head, which share their codes where the model "
        "ties them.",
    )
    bits: dict[Line, Bits] = Field(
        default={},
        description="Bits of modules by a pattern of their paths, such as '*.down_proj': 8; the "
        "first that matches counts.",
    )
    keep: tuple[Line, ...] = Field(
        default=(), description="Patterns of modules whose weights stay float."
    )
    calibration: CalibrationText = Field(
        default=CalibrationText(),
        description="The text that gptq looks at; auto is pydoc where the base has a tokenizer, "
        "else what the model itself writes. A part of it is only measured on.",
    )
    max_kl: float | None = Field(
        default=0.15, ge=0, allow_inf_nan=False,
        description="Nothing is published that is further than this, in nats a token, from the "
        "float model on text that nothing was fitted to; null for no limit.",
    )  # fmt: skip
    min_cosine: float | None = Field(
        default=0.98, ge=-1, le=1, allow_inf_nan=False,
        description="The same for encoders: the least cosine of a text's mean vector with the "
        "float model's; null for no limit.",
    )  # fmt: skip
