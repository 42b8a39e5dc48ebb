"""The two proofs of a quantized artifact, and what they must refuse."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from adaptrix_export.oracle.dequantized import dequantized
from adaptrix_export.oracle.job import tolerance_of
from adaptrix_export.oracle.prompts import choose_prompts
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.precision.settings import GPTQ, RTN, Quantization
from adaptrix_export.progress import Silent
from adaptrix_export.prove.blocks import read_blocks, replay_blocks, values_of
from adaptrix_export.prove.cases import CASES, compare
from adaptrix_export.prove.quantized import FLOAT, run_quantized
from adaptrix_export.prove.report import summary
from adaptrix_export.prove.subject import OnnxSubject
from adaptrix_export.show.parity_tables import table
from adaptrix_export.targets import open_stored
from tests.precision.artifacts import TEXT, Made, quantized

PREFILL = CASES[0]
NAME = "v_model.layers.0.mlp.down_proj.Transpose_29"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    settings = Quantization("int4", 4, RTN, symmetric=False)
    return quantized(tmp_path_factory.mktemp("rtn"), settings)


@pytest.fixture(scope="module")
def live(rounded: Made) -> Any:
    return Reference.open(rounded.job).live


def test_both_proofs_hold_and_the_loss_is_reported(rounded: Made) -> None:
    report = run_quantized(rounded.job, Silent())
    assert report["passed"], report
    floats = [case for case in report["cases"] if case["name"].startswith(FLOAT)]
    assert len(floats) == 2 and all(case["max_abs"] < 1e-5 for case in floats)
    assert report["replay"]["quantized"]["tensors"] == len(rounded.artifact.quantized) == 21
    assert 1e-6 < report["loss"]["mean_kl"] < 0.01
    assert report["loss"]["perplexity"]["float"] > 200  # a random model of 300 tokens
    limited = run_quantized(replace(rounded.job, max_kl=1e-7, level="fast"), Silent())
    assert not limited["loss"]["passed"] and not limited["passed"]
    text = summary(ReportDocument.of({**limited, "versions": {}}))
    assert "above quantize.max_kl 1e-07" in text
    document = ReportDocument.of({**report, "versions": {}})
    assert table(document).row_count == len(report["cases"]) + 2  # the replay, and the loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changed"),
    [("llama", {"tie_word_embeddings": False}), ("gpt2", {}), ("qwen3", {}), ("llama", {})],
)
def test_gptq_is_proved_and_loses_less(kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    loss = {}
    for method in (RTN, GPTQ):
        settings = Quantization("int4", 4, method, calibration=TEXT)
        made = quantized(tmp_path / method, settings, kind, **changed)
        report = run_quantized(made.job, Silent())
        assert report["passed"], report
        loss[method] = report["loss"]["mean_kl"]
        used = {m for e in made.artifact.quantized.values() for m in e["methods"]}
        assert (GPTQ in used) == (method == GPTQ)
    assert loss[GPTQ] < 0.6 * loss[RTN]


def _damage(folder: Path, initializer: str, change: Any) -> None:
    """Change the bytes of one initializer in the data file."""
    tensor = ir.load(folder / "model.onnx").graph.initializers[initializer].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    values = np.array(tensor.numpy())
    changed = change(values)
    with (folder / str(tensor.location)).open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.ascontiguousarray(changed).tobytes())


def _scale(values: Any) -> Any:
    values[5, 1] *= 1.01
    return values


def _nibbles(values: Any) -> Any:
    values[7] = (values[7] >> 4) | (values[7] << 4)
    return values


def _zero(values: Any) -> Any:
    values[3, 0] += 1 if values[3, 0] & 15 < 15 else -1
    return values


def _code(values: Any) -> Any:
    values[9, 0, 0] ^= 1
    return values


CONTROLS = [("scales", _scale), ("codes", _nibbles), ("zeros", _zero), ("codes", _code)]
CONTROL_NAMES = ["a scale off by 1%", "a row with its nibbles swapped", "a zero point off by one",
                 "a code off by one"]  # fmt: skip


@pytest.mark.parametrize("by_hash", [True, False])
@pytest.mark.parametrize(("part", "change"), CONTROLS, ids=CONTROL_NAMES)
def test_damage_to_one_block_is_refused(
    rounded: Made, live: Any, tmp_path: Path, part: str, change: Any, by_hash: bool
) -> None:
    """By its hash, and where the hash was made of the damage, too, by the values."""
    folder = tmp_path / "damaged"
    shutil.copytree(rounded.artifact.folder, folder)
    _damage_large(folder, f"{_name(rounded)}.{part}", change)
    stored = open_stored("onnx", folder)
    entries = {name: dict(entry) for name, entry in rounded.artifact.quantized.items()}
    if not by_hash and part != "scales":  # 1% moves few values past the middle of a step
        read = read_blocks(stored, _name(rounded), entries[_name(rounded)])
        assert not isinstance(read, str)
        entries[_name(rounded)]["sha256"] = read.sha256()
    replayed = replay_blocks(stored, entries, live)
    assert not replayed["passed"] and replayed["failed"] == 1
    assert replayed["failures"][0]["tensor"] == _name(rounded)


def _name(made: Made) -> str:
    return next(name for name in sorted(made.artifact.quantized) if "gate_proj" in name)


def _damage_large(folder: Path, initializer: str, change: Any) -> None:
    """As `_damage`, also for one that is small enough to lie in the graph's own file."""
    model = ir.load(folder / "model.onnx")
    value = model.graph.initializers[initializer]
    if isinstance(value.const_value, ir.ExternalTensor):
        _damage(folder, initializer, change)
        return
    assert value.const_value is not None
    value.const_value = ir.tensor(change(np.array(value.const_value.numpy())), name=initializer)
    (folder / "model.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())


@pytest.mark.parametrize(
    ("part", "change"),
    [CONTROLS[0], *(pytest.param(*control, marks=pytest.mark.slow) for control in CONTROLS[1:3])],
    ids=CONTROL_NAMES[:3],
)
def test_logits_tell_values_that_are_not_the_stored_ones(
    rounded: Made, tmp_path: Path, part: str, change: Any
) -> None:
    """An oracle of damaged values is too far from the artifact, activations being float."""
    folder = tmp_path / "damaged"
    shutil.copytree(rounded.artifact.folder, folder)
    _damage_large(folder, f"{_name(rounded)}.{part}", change)
    distances = []
    for place in (rounded.artifact.folder, folder):
        stored = open_stored("onnx", place)
        oracle = dequantized(rounded.job, values_of(stored, rounded.artifact.quantized), {})
        asked = choose_prompts(rounded.job, oracle.vocabulary, oracle.positions)
        subject = OnnxSubject(rounded.artifact.folder, 1, accuracy_level=0)
        limits = tolerance_of("fp32", "text-generation")
        distances.append(compare(PREFILL, subject, asked, PREFILL.ask(oracle, asked), limits))
    assert distances[0]["passed"] and distances[0]["max_abs"] < 1e-5
    assert distances[1]["max_abs"] > 20 * distances[0]["max_abs"]


def test_a_tied_head_reads_the_bytes_of_the_embedding(rounded: Made) -> None:
    graph = ir.load(rounded.artifact.folder / "model.onnx").graph
    kinds = [node.op_type for node in graph]
    assert kinds.count("GatherBlockQuantized") == 1
    assert kinds.count("MatMulNBits") == 4 * 5 + 1
    assert not {"MatMul", "Gather"} & {
        n.op_type for n in graph if n.inputs and "embed" in str(n.inputs[0])
    }
    codes, rows = (
        graph.initializers[f"model.embed_tokens.weight.codes{end}"].const_value
        for end in ("", ".rows")
    )
    assert isinstance(codes, ir.ExternalTensor) and isinstance(rows, ir.ExternalTensor)
    assert (codes.offset, codes.length) == (rows.offset, rows.length)
