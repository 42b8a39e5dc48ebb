"""Adapters beside a quantized base: slots stay float, and the base is the same with and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from adaptrix_export.oracle.job import Job
from adaptrix_export.passes.quantize.texts import loss_text
from adaptrix_export.precision.settings import RTN, Quantization
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.prove.subject import OnnxSubject, SwitchableSubject
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.targets.switchable_onnx import lower_switchable_onnx
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.precision.artifacts import TEXT
from tests.switchable import save_three


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three adapters of different ranks and targets over one int4 base."""
    folder = tmp_path_factory.mktemp("slots")
    base = save_base_with_tokenizer("llama", folder / "base")
    adapters = save_three("llama", base, folder)
    plan = plan_of(base, *adapters.values())
    out = folder / "out"
    out.mkdir()
    settings = Quantization("int4", 4, RTN)
    made = lower_switchable_onnx(
        plan, out, Silent(), "native", quantization=settings
    )  # fmt: skip
    text = loss_text(plan.base, TEXT)
    return Job(
        "onnx-switchable", out, base, made.precision, made.weights,
        adapters=tuple(adapters.items()), level="fast", threads=1, quantized=made.quantized,
        loss_rows=text.rows, loss_text=text.source,
    )  # fmt: skip


def test_each_adapter_is_proved_on_the_dequantized_base(job: Job) -> None:
    report = run(job, Silent())
    assert report["passed"], report
    floats = [c for c in report["cases"] if c["name"].startswith("float activations")]
    assert len(floats) == 4 and all(case["max_abs"] < 2e-5 for case in floats)
    assert set(report["loss"]["each"]) == {"base alone", "attention", "all", "mlp"}
    assert report["replay"]["quantized"]["passed"]


def test_empty_slots_are_the_slotless_graph_bit_for_bit(job: Job) -> None:
    ids = np.arange(3, 23, dtype=np.int64)[None]
    fed: Any = (ids, np.ones_like(ids), np.arange(20)[None], None)
    slots, plain = SwitchableSubject(job), OnnxSubject(job.artifact, 1, file=SLOTLESS)
    empty, _ = slots.step(*fed)
    assert np.array_equal(empty, plain.step(*fed)[0])
    slots.choose("all")
    assert np.abs(slots.step(*fed)[0] - empty).max() > 1e-3


def test_slots_are_float_and_both_graphs_read_one_data_file(job: Job) -> None:
    graphs = [ir.load(job.artifact / name).graph for name in ("model.onnx", SLOTLESS)]
    for name in job.quantized:
        places = [graph.initializers[f"{name}.codes"].const_value for graph in graphs]
        assert isinstance(places[0], ir.ExternalTensor)
        assert isinstance(places[1], ir.ExternalTensor)
        assert places[0].offset == places[1].offset
    inputs = [v for v in graphs[0].inputs if str(v.name).endswith((".lora_A", ".lora_B"))]
    assert inputs and all(v.dtype == ir.DataType.FLOAT for v in inputs)
    assert not any(node.op_type == "MatMul" and "lora" not in str(node.name)
                   for node in graphs[0] if not node.domain)  # fmt: skip
