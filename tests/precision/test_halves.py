"""fp16 and bf16: matrices in 16 bits, rounded once, and everything else as in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import TensorRef
from adaptrix_export.oracle.job import Job
from adaptrix_export.precision.settings import FLOAT32, Storage
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.targets import TARGETS
from adaptrix_export.targets.merged_onnx import Values, lower_merged_onnx
from adaptrix_export.targets.switchable_onnx import lower_switchable_onnx
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.tiny import save_adapter

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def built(folder: Path, precision: str, lower: Any = lower_merged_onnx) -> Job:
    base = save_base_with_tokenizer("llama", folder / "base")
    adapter = save_adapter(base, folder / "adapter")
    (folder / "out").mkdir()
    plan = plan_of(base, adapter)
    made = lower(plan, folder / "out", Silent(), "native", precision=precision)
    data = (made.folder / "model.onnx.data").stat().st_size
    row = TARGETS[made.target]
    assert row.estimate(plan, Storage(precision)) < 0.6 * row.estimate(plan, FLOAT32)
    assert data < 0.7 * row.estimate(plan, FLOAT32) + (1 << 20)
    return Job(
        target=made.target, artifact=made.folder, base_folder=base, precision=made.precision,
        weights=made.weights, adapters=(("adapter", adapter),), threads=1, decode_steps=8,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_matrices_are_rounded_once_and_the_graph_is_proved(tmp_path: Path, precision: str) -> None:
    job = built(tmp_path, precision)
    stored = ir.load(job.artifact / "model.onnx").graph.initializers
    kinds = {len(stored[n].shape.numpy()): stored[n].dtype for n in job.weights}
    assert kinds == {1: ir.DataType.FLOAT, 2: TYPES[precision]}
    report = run(job, Silent())
    assert report["passed"], report["cases"]
    assert report["precision"] == report["tolerance"] == precision
    assert report["replay"]["changed"] > 0 and report["replay"]["worst"]["ulps"] <= 0.50001


def test_a_value_off_by_one_unit_is_refused(tmp_path: Path) -> None:
    job = built(tmp_path, "fp16")
    name = next(n for n in sorted(job.weights) if "down_proj" in n)
    tensor = ir.load(job.artifact / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    values = np.array(tensor.numpy())
    values[3, 1] = np.nextafter(values[3, 1], np.float16(9))
    with (job.artifact / str(tensor.location)).open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(values.tobytes())
    report = run(job, Silent())
    assert not report["passed"] and report["replay"]["failed"] == 1


def test_slots_stay_float_over_a_base_in_fp16(tmp_path: Path) -> None:
    report = run(built(tmp_path, "fp16", lower_switchable_onnx), Silent())
    assert report["passed"], report["cases"]


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = save_base_with_tokenizer("llama", tmp_path / "base")
    plan = plan_of(base, save_adapter(base, tmp_path / "adapter"))

    class Large(Values):
        def _stored(self, name: str) -> Any:
            tensor = super()._stored(name)
            return type("Scaled", (), {
                "shape": tensor.shape, "rows": lambda _, a, b: tensor.rows(a, b) * 1e7,
            })()  # fmt: skip

    with pytest.raises(UnsupportedError, match="beyond the range of fp16"):
        Large(plan)(TensorRef("model.embed_tokens.weight"), "F16")
