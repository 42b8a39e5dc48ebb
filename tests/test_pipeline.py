"""The whole compiler on tiny models: what is right is published, what is not is not."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt

import pytest
from click.testing import CliRunner

import adaptrix_export.merge.merge as merge
from adaptrix_export import pipeline
from adaptrix_export.cli import main
from adaptrix_export.errors import (
    AdapterError,
    OutputError,
    ParityError,
    SourceError,
    VerificationError,
)
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.package.manifest import read_manifest, write_manifest
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = save_base("llama", folder / "base")
    return base, save_adapter(base, folder / "adapter")


def recipe(pair, out, target="onnx", **changed):
    base, adapter = pair
    return Recipe(base=str(base), adapters=[str(adapter)], target=target, out=out, **changed)


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("target", ["onnx", "safetensors"])
def test_a_right_build_is_published_whole(tmp_path, llama, target):
    outcome = build(recipe(llama, tmp_path / "out", target))
    assert outcome.report is not None and outcome.report["passed"]
    cases = {case["name"] for case in outcome.report["cases"]}
    padded = {"chunked prefill", "left-padded batch", "right-padded batch"}
    assert cases == {"prefill", "greedy decode"} | (padded if target == "onnx" else set())
    manifest = read_manifest(tmp_path / "out").as_dict()
    assert manifest == outcome.manifest and manifest["parity"]["verdict"] == "proved"
    files = (p for p in (tmp_path / "out").rglob("*") if p.is_file())
    names = {p.relative_to(tmp_path / "out").as_posix() for p in files}
    assert {*manifest["outputs"], "manifest.json"} == names
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_sixty_four_greedy_tokens_on_other_families(tmp_path, kind):
    """Random four-layer models, LoRA on every linear module, every case of the full proof."""
    base = save_base(kind, tmp_path / "base")
    pair = base, save_adapter(base, tmp_path / "adapter")
    report = build(recipe(pair, tmp_path / "out", parity={"decode_steps": 64})).report
    assert report is not None and report["passed"] and len(report["cases"]) == 5
    decode = next(case for case in report["cases"] if case["name"] == "greedy decode")
    assert decode["positions"] == 64 and decode["top1"] == 1.0
    assert max(case["max_abs"] for case in report["cases"]) <= 1e-3


def test_same_inputs_same_bytes(tmp_path, llama):
    for name in ("one", "two"):
        build(recipe(llama, tmp_path / name, parity={"level": "fast"}))
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        name = path.relative_to(tmp_path / "one")
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def scaled(change):
    return replace(change, terms=tuple(replace(t, scale=1.01 * t.scale) for t in change.terms))


def dropped(change):
    return replace(change, terms=())


def rslora(change):
    terms = tuple(replace(t, scale=t.scale * t.rank / sqrt(t.rank)) for t in change.terms)
    return replace(change, terms=terms)


ONE = "model.layers.2.mlp.up_proj.weight"
FAULTS = {
    "one delta scaled by 1.01": lambda c: scaled(c) if c.name == ONE else c,
    "one site dropped": lambda c: dropped(c) if c.name == ONE else c,
    "alpha/sqrt(r) for alpha/r": rslora,
}


@pytest.mark.parametrize("target", ["onnx", "safetensors"])
@pytest.mark.parametrize("fault", FAULTS)
def test_negative_controls_publish_nothing(tmp_path, llama, monkeypatch, target, fault):
    """A fault in lowering is caught by the proof: exit 1, a rejected report, no artifact."""
    good = merge.merged_blocks
    monkeypatch.setattr(merge, "merged_blocks", lambda c, *rest: good(FAULTS[fault](c), *rest))
    monkeypatch.setattr(
        "adaptrix_export.targets.merged_safetensors.merged_blocks", merge.merged_blocks
    )
    base, adapter = llama
    result = CliRunner().invoke(
        main,
        [
            *("build", "--base", str(base), "--adapter", str(adapter), "--target", target),
            *("--out", str(tmp_path / "out"), "--parity", "fast"),
        ],
    )
    assert result.exit_code == 1, result.output
    assert listing(tmp_path) == ["out.rejected.json"]
    report = json.loads((tmp_path / "out.rejected.json").read_text())
    assert not report["passed"] and not report["replay"]["passed"]


def test_parity_off_is_marked_unverified(tmp_path, llama):
    outcome = build(recipe(llama, tmp_path / "out", "safetensors", parity={"level": "off"}))
    assert outcome.report is None
    assert outcome.manifest["parity"] == {"verdict": "unverified", "report_sha256": None}
    assert "report.json" not in listing(tmp_path / "out")


def test_a_crash_while_writing_leaves_nothing(tmp_path, llama, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_package", broken)
    with pytest.raises(KeyboardInterrupt):
        build(recipe(llama, tmp_path / "out"))
    assert listing(tmp_path) == []


def test_bad_places_are_refused_before_any_work(tmp_path, llama, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out: exists"):
        build(recipe(llama, tmp_path / "out"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="0 MB free, expected"):
        build(recipe(llama, tmp_path / "new"))
    assert listing(tmp_path) == ["out"]


def test_an_adapter_of_another_model_is_refused(tmp_path, llama):
    other = save_base("llama", tmp_path / "other", hidden_size=32)
    wrong = (llama[0], save_adapter(other, tmp_path / "wrong"))
    with pytest.raises(AdapterError, match=r"with 32 rows, expected 64"):
        build(recipe(wrong, tmp_path / "out"))
    with pytest.raises(SourceError, match="nothing there"):
        build(recipe((tmp_path / "missing", llama[1]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_verify_finds_what_changed(tmp_path, llama):
    out = tmp_path / "out"
    build(recipe(llama, out, parity={"level": "off"}))
    found = verify_artifact(out, base=str(llama[0]), adapters=[str(llama[1])])
    assert found["parity"]["passed"]
    other = save_adapter(llama[0], tmp_path / "other", seed=9)
    with pytest.raises(VerificationError, match="another file than the artifact was built from"):
        verify_artifact(out, base=str(llama[0]), adapters=[str(other)])
    assert verify_artifact(out)["proof"] == "re-proved"  # the originals are remembered
    data = bytearray((out / "onnx/model.onnx_data").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "onnx/model.onnx_data").write_bytes(data)
    with pytest.raises(VerificationError, match=r"onnx/model.onnx_data: sha256"):
        verify_artifact(out)


@pytest.mark.slow
def test_verify_proves_again_and_notices_a_forged_manifest(tmp_path, llama):
    """Weights changed and the manifest made to fit: hashes pass, parity does not."""
    from adaptrix_export.package import hash_file

    out = tmp_path / "out"
    build(recipe(llama, out, "safetensors", parity={"level": "off"}))
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"]["model.safetensors"] = hash_file(path).as_dict()
    write_manifest(out, manifest)
    with pytest.raises(ParityError):
        verify_artifact(out, base=str(llama[0]), adapters=[str(llama[1])])
