"""One more adapter for a published artifact: proved, moved in, or refused with the reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.errors import (
    AdapterError,
    OutputError,
    ParityError,
    UnsupportedError,
    VerificationError,
)
from adaptrix_export.manage.add_adapter import add_adapter
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.package import check_hashes
from adaptrix_export.pipeline import build
from adaptrix_export.prove import proof
from adaptrix_export.prove.switched import nothing_replayed
from adaptrix_export.runtime import Session
from adaptrix_export.runtime.layout import located
from tests.artifacts import save_base_with_tokenizer
from tests.switchable import recipe, save_three
from tests.tiny import live, save_adapter, save_base

OFF = {"parity": {"level": "off"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A base, three adapters, and an artifact with two of them: `late` is to be added."""
    folder = tmp_path_factory.mktemp("add")
    base = save_base_with_tokenizer("llama", folder / "base", initializer_range=0.15)
    three = save_three("llama", base, folder)
    late = three.pop("attention")
    build(recipe(base, three, folder / "out", **OFF))
    return base, late, folder / "out"


@pytest.fixture
def out(built, tmp_path):
    return shutil.copytree(built[2], tmp_path / "out")


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("level", ["off", pytest.param("fast", marks=pytest.mark.slow)])
def test_an_adapter_is_added_beside_the_others(built, out, level):
    base, late, _ = built
    graph = located(out, "model.onnx").stat().st_mtime_ns
    before = listing(out)
    done = CliRunner().invoke(
        main, ["add-adapter", str(out), str(late), "--name", "late", "--parity", level,
               "--base", str(base), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    added = ["adapters/late.onnx_adapter", "adapters/late.safetensors"]
    if level == "fast":
        cases = {c["name"] for c in report["cases"]}
        assert report["passed"] and cases == {"late: prefill", "late: greedy decode"}
        added.append("adapters/late.report.json")
    assert listing(out) == sorted([*before, *added])
    manifest = json.loads((out / "manifest.json").read_text())
    assert "late" in manifest["energy"]["before"]
    assert (
        "late, " in (out / "report.html").read_text()
        or ">late" in (out / "report.html").read_text()
    )
    verdict = manifest["switchable"]["adapters"]["late"]
    assert verdict["parity"] == ("proved" if level == "fast" else "unverified")
    assert located(out, "model.onnx").stat().st_mtime_ns == graph
    assert not check_hashes(out)
    session = Session(out)
    assert session.adapters == ("all", "late", "mlp")
    ids = np.arange(5, 25)[None]
    with torch.no_grad():
        expected = live(base, late)(torch.tensor(ids)).logits.numpy()
    assert np.abs(session.logits(ids, adapter="late") - expected).max() < 1e-4
    with pytest.raises(OutputError, match="adapter late: exists"):
        add_adapter(out, str(late), "late", base=str(base))


@pytest.mark.slow
def test_verify_proves_an_added_adapter_too(built, out):
    base, late, _ = built
    add_adapter(out, str(late), "late", base=str(base), level="off")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["switchable"]["adapters"]["late"]["parity"] == "unverified"
    folder = late.parent
    sources = [str(folder / "all"), str(folder / "mlp"), str(late)]
    found = verify_artifact(out, base=str(base), adapters=sources)
    assert found["parity"]["passed"]
    assert {"all", "mlp", "late"} == set(found["parity"]["adapters"])


def test_a_site_without_a_slot_is_refused(built, out, tmp_path):
    base, late, _ = built
    build(recipe(base, {"mlp": late.parent / "mlp"}, tmp_path / "few", **OFF))
    before = listing(tmp_path / "few")
    with pytest.raises(AdapterError, match="q_proj: no slot in this graph.*build again"):
        add_adapter(tmp_path / "few", str(late), base=str(base), level="off")
    dora = save_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedError, match="Dora, which no slot can hold"):
        add_adapter(tmp_path / "few", str(dora), base=str(base), level="off")
    assert listing(tmp_path / "few") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "few", "out"]


def test_another_base_or_a_damaged_artifact_is_refused(built, out, tmp_path):
    _, late, _ = built
    other = save_base("llama", tmp_path / "other", seed=5)
    with pytest.raises(VerificationError, match="another file than the artifact was built from"):
        add_adapter(out, str(late), "late", base=str(other), level="off")
    with (out / "onnx/model.onnx_data").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(VerificationError, match=r"onnx/model.onnx_data"):
        add_adapter(out, str(late), "late", level="off")


def test_a_failed_proof_adds_nothing(built, out, monkeypatch):
    base, late, _ = built
    before, manifest = listing(out), (out / "manifest.json").read_bytes()
    words = ("oracle", "target", "level", "precision", "tolerance", "task", "tokens")
    failing = {**dict.fromkeys(words, ""), "passed": False, "cases": [], "adapters": {}}
    failing |= {"replay": nothing_replayed(), "versions": {}}
    monkeypatch.setattr(proof, "prove", lambda job, progress, **_: failing)
    with pytest.raises(ParityError):
        add_adapter(out, str(late), "late", base=str(base))
    assert listing(out) == before and (out / "manifest.json").read_bytes() == manifest


def test_merged_artifacts_and_rows_take_no_more(built, tmp_path):
    base, late, _ = built
    build(recipe(base, {"late": late}, tmp_path / "rows", rows=True, **OFF))
    with pytest.raises(UnsupportedError, match=r"adapters inside the graph \(rows\)"):
        add_adapter(tmp_path / "rows", str(late), "again")
    build(recipe(base, {"late": late}, tmp_path / "merged", target="onnx", **OFF))
    with pytest.raises(UnsupportedError, match="target onnx, expected onnx-switchable"):
        add_adapter(tmp_path / "merged", str(late), "again")
