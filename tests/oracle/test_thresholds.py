"""The lengths at which a model computes otherwise, and prompts that go beyond each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.prompts import choose_prompts, crossing
from adaptrix_export.oracle.thresholds import AROUND, Threshold, thresholds

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
CONFIGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_position_embeddings": 256}, []),
    ({"sliding_window": 512}, ["sliding window of 512"]),
    ({"sliding_window": None}, []),
    ({"sliding_window": 512, "use_sliding_window": False}, []),
    ({"sliding_window": 512, "layer_types": ["full_attention"] * 2}, []),
    (
        {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]},
        ["sliding window of 512"],
    ),
    ({"attention_chunk_size": 8192}, ["chunked attention of 8192"]),
    ({"window_size": 256}, ["local attention of 256"]),
    ({"rope_parameters": LONG}, ["longrope rotary embedding of 4096"]),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048},
        ["dynamic rotary embedding of 2048"],
    ),
    ({"rope_parameters": {"rope_type": "llama3"}, "max_position_embeddings": 2048}, []),
    (
        {"rope_parameters": {"full_attention": LONG}, "sliding_window": 64},
        ["sliding window of 64", "longrope rotary embedding of 4096"],
    ),
    ({"text_config": {"sliding_window": 64}}, ["sliding window of 64"]),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_thresholds_of_a_config(config: dict[str, Any], expected: list[str]) -> None:
    assert [str(threshold) for threshold in thresholds(config)] == expected


def job(*crossings: Threshold) -> Job:
    nowhere = Path("nowhere")
    return Job("onnx", nowhere, nowhere, "fp32", {}, decode_steps=16, crossings=crossings)


@pytest.mark.parametrize("at", [12, 512])
def test_prompts_lie_on_both_sides_of_a_threshold(at: int) -> None:
    window = Threshold("sliding window", at)
    asked = crossing(job(window), window, 300, at + 200)
    assert asked is not None
    assert len(asked.prefill) * 3 // 5 < at + AROUND < len(asked.prefill)
    assert len(asked.decode) < at < len(asked.decode) + asked.steps
    starts = [len(row) - asked.cached for row in asked.rows]
    assert any(start > at for start in starts)
    assert any(start < at < start + asked.cached for start in starts)
    assert max(map(len, asked.rows)) <= at + 200


def test_a_threshold_beyond_the_positions_is_not_crossed() -> None:
    window = Threshold("sliding window", 512)
    assert crossing(job(window), window, 300, 520) is None


def test_usual_prompts_stay_below_a_length_at_which_the_model_switches() -> None:
    switch = Threshold("dynamic rotary embedding", 32, switching=True)
    asked = choose_prompts(job(switch), 300, 256)
    longest = max(len(asked.prefill), len(asked.decode) + asked.steps, *map(len, asked.rows))
    assert longest <= 32
