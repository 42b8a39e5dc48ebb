"""The whole model beyond its smallest threshold: where it is affordable, or asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.thresholds import Threshold
from adaptrix_export.progress import Silent
from adaptrix_export.prove.long_prompts import long_crossings
from adaptrix_export.prove.parity import prove
from tests.artifacts import plan_of
from tests.prove.bench import Bench
from tests.tiny import save_base


def test_auto_spends_minutes_at_most(tmp_path: Path) -> None:
    base = plan_of(save_base("llama", tmp_path)).base
    windowed = replace(base, config={**base.config, "sliding_window": 64})
    huge = replace(base, config={**base.config, "sliding_window": 10**9})
    window = (Threshold("sliding window", 64),)
    assert long_crossings(base, "on") == ()
    assert [long_crossings(windowed, word) for word in ("off", "on", "auto")] == [
        (),
        window,
        window,
    ]
    assert long_crossings(huge, "auto") == () != long_crossings(huge, "on")


@pytest.mark.slow
def test_a_job_with_a_threshold_has_its_cases(bench: Callable[[str], Bench]) -> None:
    """A model without any passes around a length of no meaning, in every case."""
    job: Job = bench("llama").job("safetensors")
    report: dict[str, Any] = prove(replace(job, crossings=(Threshold("mark", 32),)), Silent())
    names = [case["name"] for case in report["cases"]]
    assert names[-2:] == ["prefill across a mark of 32", "decode across a mark of 32"]
    assert report["passed"]
