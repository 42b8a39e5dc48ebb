"""Reports, jobs, prompts and the numbers between them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import TensorRef
from adaptrix_export.oracle.compare import distance
from adaptrix_export.oracle.job import TOLERANCES, Job
from adaptrix_export.oracle.prompts import CACHED, choose_prompts
from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.prove.cases import CASES, Answer, compare
from adaptrix_export.prove.report import save, summary
from adaptrix_export.prove.subject import TransformersSubject
from adaptrix_export.show.parity_tables import table

FP32 = TOLERANCES["fp32"]


def a_job(tmp_path: Path, **options: Any) -> Job:
    return Job(
        "onnx", tmp_path / "out", tmp_path / "base", "fp32", {"w": TensorRef("m.w")}, **options
    )


def test_a_job_survives_the_trip_to_the_child(tmp_path: Path) -> None:
    job = a_job(tmp_path, adapters=(("x", tmp_path / "a"),), gguf_file="m.gguf", threads=2)
    assert Job.from_json(job.to_json()) == job


def test_a_job_for_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="'tflite', expected one of onnx, onnx-switchable"):
        dataclasses.replace(a_job(tmp_path), target="tflite")


def test_distance_of_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    a, b = (np.log(np.array([x, x])).astype(np.float32) for x in (p, q))
    found = distance(a, b)
    assert found.max_abs == pytest.approx(np.log(2), rel=1e-6)
    assert found.mean_kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)
    assert found.top1 == 0.0
    same = distance(a, a + np.float32(0.5))  # a shift of all logits is the same distribution
    assert same.mean_kl == pytest.approx(0, abs=1e-12) and same.top1 == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_within_nothing(bad: float) -> None:
    good = np.zeros((2, 4), np.float32)
    worse = good.copy()
    worse[1, 1] = bad
    for pair in ((good, worse), (worse, good), (worse, worse)):
        assert not distance(*pair).within(FP32)


def test_logits_of_another_shape_are_an_error() -> None:
    with pytest.raises(ParityError, match="returned shape"):
        distance(np.zeros((2, 4), np.float32), np.zeros((1, 4), np.float32))


def test_prompts_stay_within_the_positions_of_the_model(tmp_path: Path) -> None:
    for room in (4, 17, 40, 129, 2048):
        asked = choose_prompts(a_job(tmp_path), vocabulary=50, positions=room)
        assert len(asked.prefill) + asked.steps <= room or len(asked.prefill) == room - asked.steps
        assert len(asked.decode) + asked.steps <= room
        assert max(map(len, asked.rows)) <= room
        assert min(map(len, asked.rows)) > asked.cached
    assert asked.cached == CACHED and asked.steps == 32 and len(asked.prefill) == 128
    assert len(set(map(len, asked.rows))) == 3
    with pytest.raises(ParityError, match="3 positions"):
        choose_prompts(a_job(tmp_path), 50, 3)


def a_report(**changed: Any) -> dict[str, Any]:
    logits = np.zeros((3, 4), np.float32)
    case = CASES[0]
    still = dataclasses.replace(case, play=lambda subject, asked, answer: logits)
    entry = compare(still, Any, Any, Answer(logits), FP32)  # type: ignore[arg-type]
    replay = {"tensors": 2, "elements": 8, "changed": 1, "worst": {"tensor": "w", "ulps": 0.5}}
    replay |= {"failed": 0, "failures": [], "unmapped": [], "passed": True}
    whole: dict[str, Any] = {"oracle": "it", "level": "full", "precision": "fp32", "cases": [entry]}
    whole |= {"target": "onnx", "tolerance": "fp32", "task": "text-generation", "tokens": "some"}
    whole |= {"versions": {}}
    return whole | {"replay": replay, "passed": True} | changed


def text_of(report: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table(ReportDocument.of(report)))
    return capture.get()


def test_table_and_summary_of_a_pass() -> None:
    report = a_report()
    assert text_of(report).count("passed") == 2
    assert summary(ReportDocument.of(report)).startswith(
        "parity passed: 1 cases within 0.0e+00, 2 tensors"
    )


def test_table_and_summary_of_a_failure_name_what_failed() -> None:
    failure = {"tensor": "x[0].weight", "sites": ["x[0]"], "why": "[1] of 8", "ulps": None}
    replay = a_report()["replay"] | {"failed": 1, "failures": [failure], "passed": False}
    case = a_report()["cases"][0] | {"passed": False, "max_abs": None, "mean_kl": None}
    report = a_report(replay=replay, cases=[case], passed=False)
    shown = text_of(report)
    assert "passed" not in shown and "x[0].weight" in shown and "[1] of 8" in shown
    assert summary(ReportDocument.of(report)) == (
        "parity failed: prefill (max abs not finite); weight replay of 1 tensors, first at x[0]"
    )


def test_saved_reports_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        save(a_report(), tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"format": 1, **a_report()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_padded_cases_are_right_where_the_model_is(
    base: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """transformers masks pads on either side: against itself every case must pass."""
    from adaptrix_export.oracle.reference import Reference

    job = dataclasses.replace(a_job(tmp_path), base_folder=base(kind), threads=1)
    reference = Reference.open(job)
    asked = choose_prompts(job, reference.vocabulary, reference.positions)
    subject = TransformersSubject(base(kind), threads=1)
    for case in CASES:
        entry = compare(case, subject, asked, case.ask(reference, asked), FP32)
        assert entry["passed"], entry
        assert entry["positions"] == {
            "prefill": 128,
            "chunked prefill": 128,
            "greedy decode": 32,
        }.get(case.name, sum(len(row) for row in asked.rows))


def test_the_parent_imports_nothing_heavy() -> None:
    code = (
        "import sys, adaptrix_export.prove.parity, adaptrix_export.show.parity_tables\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnxruntime', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
