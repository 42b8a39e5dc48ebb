"""The room that a build asks for before it starts, against what it then writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptrix_export.precision.settings import FLOAT32, Quantization, Storage
from adaptrix_export.targets import TARGETS
from tests.precision.artifacts import quantized


@pytest.mark.parametrize("settings", [
    Quantization("int4", 4),
    Quantization("int4", 4, symmetric=False, embedding=4),
    Quantization("int8", 8, keep=("*.down_proj",)),
    Quantization("int4", 4, embedding=None, overrides=(("*.down_proj", 8),)),
])  # fmt: skip
def test_a_quantized_graph_takes_what_was_estimated(tmp_path: Path, settings: Quantization) -> None:
    made = quantized(tmp_path, settings)
    data = (made.artifact.folder / "model.onnx.data").stat().st_size
    estimate = TARGETS["onnx"].estimate
    room = estimate(made.plan, Storage(quantization=settings))
    assert data <= 1.05 * room + (1 << 20)
    assert room < 0.6 * estimate(made.plan, FLOAT32)
    assert sum(entry["bytes"] for entry in made.artifact.quantized.values()) <= room
