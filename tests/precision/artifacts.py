"""Tiny quantized artifacts, and the jobs that prove them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.measure.calibration import PYDOC, Calibration
from adaptrix_export.oracle.job import Job
from adaptrix_export.passes.quantize.texts import loss_text
from adaptrix_export.plan import Plan
from adaptrix_export.precision.settings import Quantization
from adaptrix_export.progress import Silent
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.tiny import save_adapter

TEXT = Calibration(PYDOC, tokens=1024, length=64)


@dataclass(frozen=True)
class Made:
    artifact: Artifact
    plan: Plan
    job: Job


def quantized(
    folder: Path, settings: Quantization, kind: str = "llama", frontend: str = "native",
    **base: Any,
) -> Made:  # fmt: skip
    """A random model with a LoRA merged in, quantized, in `folder`/out."""
    home = save_base_with_tokenizer(kind, folder / "base", **base)
    adapter = save_adapter(home, folder / "adapter")
    plan = plan_of(home, adapter)
    out = folder / "out"
    out.mkdir()
    artifact = lower_merged_onnx(plan, out, Silent(), frontend, quantization=settings)
    text = loss_text(plan.base, TEXT)
    job = Job(
        target="onnx", artifact=out, base_folder=home, precision=artifact.precision,
        weights=artifact.weights, adapters=(("adapter", adapter),), threads=1, decode_steps=32,
        task=plan.base.task,
        quantized=artifact.quantized, loss_rows=text.rows, loss_text=text.source,
    )  # fmt: skip
    return Made(artifact, plan, job)
