"""Batches: what is built, what is there already, what fails, and processes that die."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from adaptrix_export import pipeline
from adaptrix_export.cli import main
from adaptrix_export.commands.batch import build_cell
from adaptrix_export.manage.batch import BUILT, FAILED, THERE, run_batch
from adaptrix_export.recipe.matrix import cells
from tests.manage.dying import dies_the_first_time
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    base = save_base("llama", folder / "base")
    names = {"one": ["q_proj"], "two": ["v_proj", "down_proj"]}
    for seed, (name, modules) in enumerate(names.items()):
        save_adapter(base, folder / name, seed=seed, target_modules=modules)
    return folder


def document(model, out, **changed):
    matrix = {"adapter": [str(model / "one"), str(model / "two")]}
    return {
        "base": str(model / "base"), "target": "safetensors", "out": str(out),
        "parity": {"level": "off"}, "matrix": matrix, **changed,
    }  # fmt: skip


def run(folder, *arguments, code=0):
    done = CliRunner().invoke(main, ["batch", *map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)["builds"]


def saved(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def test_a_batch_is_built_once_and_then_there(model, tmp_path, monkeypatch):
    recipe = saved(tmp_path / "recipe.yaml", document(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    listed = run(tmp_path, recipe, "--dry-run")
    assert [entry["label"] for entry in listed] == ["adapter-one", "adapter-two"]
    assert not (tmp_path / "out").exists()
    page = tmp_path / "page.html"
    first = run(tmp_path, recipe, "--page", page)
    assert [entry["state"] for entry in first] == [BUILT, BUILT]
    assert "adapter-two" in page.read_text(encoding="utf-8")
    alone = next(iter(cells(document(model, tmp_path / "alone")))).recipe
    pipeline.build(alone)
    weights = "model.safetensors"
    assert (alone.out / weights).read_bytes() == (
        tmp_path / "out" / "adapter-one" / weights
    ).read_bytes()
    monkeypatch.setattr(pipeline, "build", None)
    assert [entry["state"] for entry in run(tmp_path, recipe)] == [THERE, THERE]


@pytest.mark.parametrize("change", ["input", "recipe", "output"])
def test_an_artifact_of_something_else_is_not_taken_for_it(model, tmp_path, change):
    adapter = save_adapter(model / "base", tmp_path / "own", target_modules=["q_proj"])
    content = document(model, tmp_path / "out", matrix={"adapter": [str(adapter)]})
    recipe = saved(tmp_path / "recipe.yaml", content)
    run(tmp_path, recipe)
    if change == "input":
        save_adapter(model / "base", tmp_path / "own", seed=9, target_modules=["q_proj"])
    if change == "recipe":
        saved(recipe, {**content, "report": False})
    if change == "output":
        path = tmp_path / "out" / "adapter-own" / "config.json"
        path.write_text(path.read_text() + " ")
    (entry,) = run(tmp_path, recipe, code=2)
    assert entry["state"] == FAILED and entry["error"]["error"] == "OutputError"


def test_a_failure_does_not_stop_the_others(model, tmp_path):
    matrix = {"adapter": [str(model / "one"), str(tmp_path / "nowhere"), str(model / "two")]}
    recipe = saved(tmp_path / "recipe.yaml", document(model, tmp_path / "out", matrix=matrix))
    found = run(tmp_path, recipe, code=2)
    assert [entry["state"] for entry in found] == [BUILT, FAILED, BUILT]
    assert "nowhere" in found[1]["error"]["place"]


def test_two_builds_at_one_place_are_refused_before_any(model, tmp_path):
    recipe = saved(tmp_path / "recipe.yaml", document(model, tmp_path / "out"))
    done = CliRunner().invoke(main, ["batch", str(recipe), str(recipe)])
    assert done.exit_code == 2 and "a folder of its own" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_builds_of_a_process_that_died_are_tried_once_more(model, tmp_path):
    matrix = {
        "adapter": [
            {"source": str(model / "one"), "name": name} for name in ("once", "always", "never")
        ]
    }
    found = list(
        run_batch(cells(document(model, tmp_path, matrix=matrix)), dies_the_first_time, jobs=2)
    )
    states = {result.label: result.state for result in found}
    assert states == {"adapter-once": BUILT, "adapter-always": FAILED, "adapter-never": BUILT}
    assert {result.exit_code for result in found} == {0, 3}


@pytest.mark.slow
def test_processes_make_the_same_artifacts(model, tmp_path):
    for jobs, name in ((1, "a"), (2, "b")):
        found = list(run_batch(cells(document(model, tmp_path / name)), build_cell, jobs))
        assert [result.state for result in found] == [BUILT, BUILT]
    for path in sorted((tmp_path / "a").rglob("*.safetensors")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert other.read_bytes() == path.read_bytes()
