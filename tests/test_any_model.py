"""A merged checkpoint of any type of transformers, proved with inputs drawn from a seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptrix_export import pipeline
from adaptrix_export.errors import AdapterError, ParityError, UnsupportedError
from adaptrix_export.load import open_base
from adaptrix_export.oracle.job import Job
from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.prove import child, proof
from adaptrix_export.recipe import Recipe
from tests.any_model import KINDS, Kind, save_kind

QUICK = ("ViTForImageClassification", "WhisperForConditionalGeneration")


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """The proof in this process: another one would import everything again for each type."""
    monkeypatch.setattr(proof, "prove", lambda job, progress, **_: child.run(job, progress))


def kind(name: str) -> Kind:
    return next(row for row in KINDS if row.cls == name)


def built(base: Path, adapter: Path, out: Path, **more: object) -> pipeline.Outcome:
    recipe = {"base": str(base), "adapters": [str(adapter)], "target": "safetensors", "out": out}
    return build(Recipe.model_validate({**recipe, **more}))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.cls, marks=() if row.cls in QUICK else pytest.mark.slow)
        for row in KINDS
    ],
)
def test_the_merged_checkpoint_is_exact(row, tmp_path):
    base, adapter = save_kind(row, tmp_path)
    outcome = built(base, adapter, tmp_path / "out")
    assert outcome.report["task"] == row.task
    assert outcome.report["passed"]
    changed = load_file(tmp_path / "out/model.safetensors")
    before = load_file(base / "model.safetensors")
    assert set(changed) == set(before)
    assert sum(not changed[n].equal(before[n]) for n in before) >= 2


def test_a_wrong_weight_fails_whichever_tower_it_is_in(tmp_path, monkeypatch):
    base, adapter = save_kind(kind("LlavaForConditionalGeneration"), tmp_path)
    jobs: list[Job] = []

    def here(job, progress, **options):
        jobs.append(job)
        return child.run(job, progress)

    monkeypatch.setattr(proof, "prove", here)
    built(base, adapter, tmp_path / "out")
    job = replace(jobs[0], artifact=tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    right = load_file(file)
    for part, failing in (("vision", "image features"), ("language", "forward")):
        tensors = dict(right)
        name = next(n for n in tensors if part in n and n.endswith("v_proj.weight"))
        tensors[name] = torch.randn_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
        cases = {c["name"]: c["passed"] for c in child.run(job, Silent())["cases"]}
        assert not cases[failing], name


def test_what_has_no_graph_is_refused_by_name(tmp_path):
    base, adapter = save_kind(kind("BertForPreTraining"), tmp_path)
    with pytest.raises(UnsupportedError, match=r"BertForPreTraining.*--target safetens"):
        built(base, adapter, tmp_path / "out", target="onnx")


def test_a_head_that_nobody_saved_is_missed(tmp_path):
    row = kind("ViTForImageClassification")
    base, adapter = save_kind(row, tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    tensors = load_file(base / "model.safetensors")
    body = {n: t for n, t in tensors.items() if not n.startswith("classifier")}
    save_file(body, bare / "model.safetensors", metadata={"format": "pt"})
    assert open_base(str(bare)).lacking == ("classifier.weight", "classifier.bias")
    outcome = built(bare, adapter, tmp_path / "out")  # the adapter ships it
    assert outcome.report["passed"]
    headless = tmp_path / "headless"
    shutil.copytree(adapter, headless)
    kept = load_file(adapter / "adapter_model.safetensors")
    kept = {n: t for n, t in kept.items() if "classifier" not in n}
    save_file(kept, headless / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"no classifier\.weight, in the base or the adapter"):
        built(bare, headless, tmp_path / "out2")


def test_inputs_that_are_not_known_are_named(tmp_path):
    from adaptrix_export.oracle.drawn import drawn_inputs

    class Odd:
        input_modalities, main_input_name = "text", "input_ids"
        config = json.loads

        def forward(self, input_ids, secret): ...

        def can_generate(self):
            return False

        @property
        def base_model(self):
            return self

    with pytest.raises(ParityError, match="a required input 'secret'.*--parity off"):
        drawn_inputs(Odd())
