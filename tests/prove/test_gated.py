"""The proof of gates: what is right passes, and what is a little wrong does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from adaptrix_export.graph.rewrite.gate_functions import DOMAIN, FLOOR
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.oracle.gated import compare_statistics
from adaptrix_export.oracle.job import GateSpec, Job, gate_specs
from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.show.parity_tables import gates_table, table
from adaptrix_export.targets import TARGETS
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base

TAU = 0.08
Change = Callable[[ir.Model], None]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that passes: gpt2, every site clamped, statistics."""
    folder = tmp_path_factory.mktemp("gated")
    base = save_base("gpt2", folder / "base", initializer_range=0.15)
    adapter = save_adapter(base, folder / "adapter")
    plan = verify(WireContext(tau=TAU, stats=True)(plan_of(base, adapter)))
    (folder / "out").mkdir()
    artifact = TARGETS["onnx"].lower(plan, folder / "out", Silent())
    return Job(
        "onnx", artifact.folder, base, "fp32", artifact.weights, adapters=(("only", adapter),),
        decode_steps=4, level="fast", threads=1, gates=gate_specs(plan.gates), gate_stats=True,
    )  # fmt: skip


def changed(job: Job, folder: Path, change: Change) -> Job:
    """The artifact with its graph changed, in a folder of its own."""
    folder.mkdir()
    shutil.copyfile(job.artifact / "model.onnx.data", folder / "model.onnx.data")
    model = ir.load(job.artifact / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
    return replace(job, artifact=folder)


def gates(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def checks(report: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in report["context"]["checks"]}


def test_the_right_artifact_passes_and_the_report_names_its_oracle(right: Job) -> None:
    report = run(right, Silent())
    assert report["passed"] and set(checks(report).values()) == {True}
    assert len(checks(report)) == 4
    assert "gates as forward hooks" in report["oracle"]
    sites = report["context"]["sites"]
    assert [line["site"] for line in sites] == [gate.site for gate in right.gates]
    shares = [line["clamped"] for line in sites]
    assert 0.1 < float(np.mean(shares)) < 0.9
    assert all(0 < line["gate_min"] <= line["gate_mean"] <= 1 for line in sites)


def test_a_tau_that_is_five_percent_off_fails_by_node_and_by_value(
    right: Job, tmp_path: Path
) -> None:
    def loosen(model: ir.Model) -> None:
        for node in gates(model):
            node.attributes["tau"] = ir.AttrFloat32("tau", TAU * 1.05)

    report = run(changed(right, tmp_path / "loose", loosen), Silent())
    assert not report["passed"]
    assert not any(checks(report).values())
    assert not any(case["passed"] for case in report["cases"])


def test_a_graph_whose_gates_ignore_the_mask_fails(right: Job, tmp_path: Path) -> None:
    def ignore(model: ir.Model) -> None:
        (mask,) = {id(n.inputs[2]): n.inputs[2] for n in gates(model)}.values()
        one = ir.node("Constant", [], {"value_float": FLOOR})
        added = ir.node("Min", [mask, one.outputs[0]])
        added.outputs[0].name, one.outputs[0].name = "all.tokens", "all.floor"
        model.graph.insert_before(gates(model)[0], [one, added])
        for node in gates(model):
            node.replace_input_with(2, added.outputs[0])
        model.graph.sort()

    found = checks(run(changed(right, tmp_path / "unmasked", ignore), Silent()))
    assert found["statistics, prefill"]  # nothing is padded there
    assert not found["statistics, left-padded"]
    assert not found["statistics, right-padded"]


def test_a_site_without_its_gate_fails(right: Job, tmp_path: Path) -> None:
    def remove(model: ir.Model) -> None:
        node = gates(model)[2]
        added = ir.node("Add", list(node.inputs[:2]))
        added.outputs[0].name = "plain"
        model.graph.insert_before(node, added)
        node.outputs[0].replace_all_uses_with(added.outputs[0])

    report = run(changed(right, tmp_path / "open", remove), Silent())
    assert not report["passed"]
    assert not any(case["passed"] for case in report["cases"])


def test_a_factor_that_is_off_in_one_value_fails_the_replay(right: Job, tmp_path: Path) -> None:
    name = "transformer.h.1.attn.c_attn.lora_B"

    def nudge(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        values = value.const_value.numpy().copy()
        values[0, 0] = np.nextafter(np.nextafter(values[0, 0], np.float32(9)), np.float32(9))
        value.const_value = ir.tensor(values, name=name)

    report = run(changed(right, tmp_path / "nudged", nudge), Silent())
    assert not report["replay"]["passed"]
    assert [failure["tensor"] for failure in report["replay"]["failures"]] == [name]


def test_a_job_keeps_its_gates_in_json(right: Job) -> None:
    assert Job.from_json(right.to_json()).gates == right.gates
    assert json.loads(right.to_json())["gates"][0]["mode"] == "clamp"
    assert isinstance(right.gates[0], GateSpec)


def test_statistics_that_the_graph_should_give_and_does_not_fail(
    right: Job, tmp_path: Path
) -> None:
    def silence(model: ir.Model) -> None:
        kept = [value for value in model.graph.outputs if value.name != "context.clamped"]
        model.graph.outputs[:] = kept if tell else [v for v in kept if "context" not in v.name]

    for tell in (True, False):
        wanted = changed(right, tmp_path / f"told {tell}", silence)
        report = run(wanted, Silent())
        assert not report["passed"]
        lost = "clamped" if tell else "gate_mean, gate_min, clamped"
        assert checks(report)[f"statistics, no {lost}"] is False
    assert run(replace(wanted, gate_stats=False), Silent())["passed"]


def test_the_report_shows_every_site(right: Job) -> None:
    report = run(right, Silent())
    shown = Console(width=140, record=True, file=StringIO())
    document = ReportDocument.of(report)
    for made in (gates_table(document), table(document)):
        shown.print(made)
    text = shown.export_text()
    for gate, line in zip(right.gates, report["context"]["sites"], strict=True):
        row = next(row for row in text.splitlines() if f" {gate.site} " in row)
        for number in (f"{line['gate_mean']:.3f}", f"{100 * line['clamped']:.1f}%"):
            assert number in row
    assert "gates: statistics, left-padded" in text


@pytest.mark.parametrize(
    ("mean", "clamped", "passes"),
    [
        (0.5, 0.50, True), (0.51, 0.50, False), (0.5, 0.53, True), (0.5, 0.56, False),
        (np.nan, 0.50, False), (0.5, np.nan, False),
    ],
)  # fmt: skip
def test_how_close_statistics_must_be(mean: float, clamped: float, passes: bool) -> None:
    wanted = {"gate_mean": [0.5], "gate_min": [0.2], "clamped": [0.5]}
    found = {"gate_mean": [mean], "gate_min": [0.2], "clamped": [clamped]}
    compared = compare_statistics(wanted, found, 100)
    assert compared["passed"] is passes
    json.dumps(compared, allow_nan=False)
    assert not compare_statistics(wanted, {**found, "gate_min": [0.2, 0.2]}, 100)["passed"]
