"""What a recipe's `precision` and `quantize` ask for."""

from __future__ import annotations

from typing import Any

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.measure.calibration import AUTO, PYDOC, SELF, Calibration
from adaptrix_export.passes.quantize.texts import has_tokenizer
from adaptrix_export.plan import Plan
from adaptrix_export.precision.formats import PRECISIONS
from adaptrix_export.precision.settings import GPTQ, RTN, Quantization, Storage
from adaptrix_export.recipe import Recipe
from adaptrix_export.recipe.quantize import Quantize
from adaptrix_export.recipe.targets import Target
from adaptrix_export.recipe.words import HALVES, QUANTIZED, Method, Precision, Scales


def quantization_of(recipe: Recipe, plan: Plan) -> Quantization | None:
    """How the weights of a plan are to be quantized, or None for floats.

    Raises UnsupportedError for what cannot be quantized yet.
    """
    if recipe.precision not in QUANTIZED:
        return None
    if plan.gated() and recipe.target is Target.ONNX:
        raise UnsupportedError(
            f"precision {recipe.precision}", "gates that depend on the data in a merged graph",
            "target onnx-switchable, mode blend, or none", "leave context out, or use fp32",
        )  # fmt: skip
    if recipe.quantize is not None and recipe.quantize.method is Method.LOSSLESS:
        _check_lossless(recipe, plan)
    return quantization(recipe.precision, recipe.quantize or Quantize(), has_tokenizer(plan.base))


def _check_lossless(recipe: Recipe, plan: Plan) -> None:
    """Raise UnsupportedError where the artifact cannot hold the file's own codes."""
    if plan.base.gguf_file is None:
        raise UnsupportedError(
            f"quantize.method lossless: {plan.base.spec}", "a base without such codes",
            "a GGUF file in Q4_0, Q4_1 or Q8_0", "use method gptq or rtn",
        )  # fmt: skip
    if recipe.target is not Target.ONNX_SWITCHABLE:
        raise UnsupportedError(
            f"quantize.method lossless with target {recipe.target}", "adapters merged into weights",
            "target onnx-switchable, which leaves them beside the base's codes",
            "change the target, or use method gptq or rtn",
        )  # fmt: skip


def storage_of(recipe: Recipe, plan: Plan) -> Storage:
    """How the weights of a plan's graph are to be stored."""
    if recipe.precision in HALVES:
        return Storage(recipe.precision.value)
    return Storage(quantization=quantization_of(recipe, plan))


def quantization(precision: Precision, spec: Quantize, has_tokenizer: bool) -> Quantization:
    """The settings of int8 and int4; without a section, those of an empty one."""
    bits = PRECISIONS[precision.value].bits
    assert bits is not None
    method = spec.method.value
    if spec.method is Method.AUTO:
        method = GPTQ if bits == 4 else RTN
    text = spec.calibration
    source = (PYDOC if has_tokenizer else SELF) if text.text == AUTO else text.text
    embedding: Any = spec.embedding
    return Quantization(
        precision=precision.value,
        bits=bits,
        method=method,
        block=spec.block,
        symmetric=spec.symmetric,
        embedding=None if embedding == "float" else embedding,
        keep=spec.keep,
        overrides=tuple(spec.bits.items()),
        fp16_scales=spec.scales is Scales.FP16,
        calibration=Calibration(source, text.tokens, text.length, text.seed),
        max_kl=spec.max_kl,
        min_cosine=spec.min_cosine,
    )
