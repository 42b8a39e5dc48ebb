"""Several adapters for a published artifact: proved in one process, bad ones left out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adaptrix_export.cli import main
from adaptrix_export.errors import OutputError, ParityError, SourceError
from adaptrix_export.manage import add_adapters as module
from adaptrix_export.manage.add_adapter import add_adapter
from adaptrix_export.manage.add_adapters import add_adapters, read_list
from adaptrix_export.package import check_hashes
from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.prove.each import run_each
from adaptrix_export.runtime import Session
from tests.artifacts import save_base_with_tokenizer
from tests.switchable import recipe, save_three
from tests.tiny import live, save_adapter

OFF = {"parity": {"level": "off"}}
NEW = ("a0", "a1", "a2")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A base, an artifact with three adapters, and three more of other ranks and modules."""
    folder = tmp_path_factory.mktemp("many")
    base = save_base_with_tokenizer("llama", folder / "base", initializer_range=0.15)
    build(recipe(base, save_three("llama", base, folder), folder / "out", **OFF))
    modules = (["q_proj", "v_proj"], ["down_proj"], ["q_proj", "k_proj", "o_proj", "up_proj"])
    new = [
        save_adapter(base, folder / name, seed=7 + n, r=2 + n, target_modules=modules[n])
        for n, name in enumerate(NEW)
    ]
    return base, new, folder / "out"


@pytest.fixture
def out(built, tmp_path):
    return shutil.copytree(built[2], tmp_path / "out")


def in_this_process(jobs, progress):
    """`prove_each` without its child."""
    return run_each(json.dumps({name: job.to_json() for name, job in jobs.items()}), Silent())


def adapters_in(folder):
    return set(json.loads((folder / "manifest.json").read_text())["switchable"]["adapters"])


def scaled_in_the_file(written, factor):
    """`add_adapter_file` that writes another adapter than was read: a fault for the proof."""

    def write(stage, slots, adapter, version, shares):
        from dataclasses import replace

        if adapter.name == "a1":
            terms = [
                replace(d, terms=tuple(replace(t, scale=factor * t.scale) for t in d.terms))
                for d in adapter.deltas
            ]
            adapter = replace(adapter, deltas=tuple(terms))
        return written(stage, slots, adapter, version, shares)

    return write


def test_several_are_added_and_bad_ones_left_out(built, out, tmp_path):
    base, new, _ = built
    nan = shutil.copytree(new[0], tmp_path / "nan")
    tensors = load_file(nan / "adapter_model.safetensors")
    tensors[min(tensors)][0] = float("nan")
    save_file(tensors, nan / "adapter_model.safetensors")
    dora = save_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    there = shutil.copytree(new[0], tmp_path / "mlp")
    sources = [new[0], nan, dora, tmp_path / "nowhere", there, new[1], new[0], new[2]]
    listed = tmp_path / "list.txt"
    listed.write_text("# more\n" + "\n".join(map(str, sources[2:])) + "\n\n")
    done = CliRunner().invoke(
        main, ["add-adapter", str(out), str(sources[0]), str(sources[1]), "--from", str(listed),
               "--base", str(base), "--parity", "off", "--json"],
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert [a["name"] for a in document["added"]] == list(NEW)
    left = {entry["name"]: entry["error"] for entry in document["left_out"]}
    expected = {"nan", "dora", "nowhere", "mlp", "a0"}
    assert set(left) == expected and left["a0"] == left["mlp"] == "OutputError"
    assert done.exit_code == 2
    assert {*NEW, "all", "mlp"} <= adapters_in(out)
    assert not check_hashes(out)
    session = Session(out)
    ids = np.arange(5, 25)[None]
    for name, folder in zip(NEW, new, strict=True):
        with torch.no_grad():
            wanted = live(base, folder)(torch.tensor(ids)).logits.numpy()
        assert np.abs(session.logits(ids, adapter=name) - wanted).max() < 1e-4


def test_groups_are_published_one_after_the_other(built, out, monkeypatch):
    base, new, _ = built
    monkeypatch.setattr(module, "TOGETHER", 1)
    good, calls = module.add_adapter_file, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return good(*args)

    monkeypatch.setattr(module, "add_adapter_file", stops)
    with pytest.raises(KeyboardInterrupt):
        add_adapters(out, list(map(str, new)), base=str(base), level="off")
    assert {"a0", "a1"} <= adapters_in(out) and "a2" not in adapters_in(out)
    assert not check_hashes(out)
    monkeypatch.setattr(module, "add_adapter_file", good)
    again = add_adapters(out, list(map(str, new)), base=str(base), level="off")
    assert [a.name for a in again.added] == ["a2"]
    assert all(isinstance(left.error, OutputError) for left in again.left_out)


@pytest.mark.parametrize("text", [None, b"\xff\xfe\0"])
def test_a_list_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / "list").write_bytes(text)
    with pytest.raises(SourceError, match="cannot be read"):
        read_list(tmp_path / "list")


def test_nothing_named_or_a_name_for_several_is_a_usage_error(out):
    for arguments in ([], ["a", "b", "--name", "x"]):
        done = CliRunner().invoke(main, ["add-adapter", str(out), *arguments])
        assert done.exit_code == 2 and "adapter" in done.output


def test_each_is_proved_as_it_would_be_alone(built, out, monkeypatch):
    """One process for all: the reports are those of `add_adapter`, and a wrong file fails."""
    base, new, _ = built
    monkeypatch.setattr(module, "prove_each", in_this_process)
    good = module.add_adapter_file
    monkeypatch.setattr(module, "add_adapter_file", scaled_in_the_file(good, 1.01))
    outcome = add_adapters(out, list(map(str, new)), base=str(base), level="fast")
    assert [a.name for a in outcome.added] == ["a0", "a2"]
    (left,) = outcome.left_out
    assert left.name == "a1" and isinstance(left.error, ParityError)
    assert not left.error.report["adapters"]["a1"]["passed"]
    assert "a1" not in adapters_in(out) and not check_hashes(out)
    assert not list((out / "adapters").glob("a1*"))
    for added in outcome.added:
        assert added.report["passed"] and added.entry["parity"] == "proved"
        assert {c["name"] for c in added.report["cases"]} == {
            f"{added.name}: prefill", f"{added.name}: greedy decode",
        }  # fmt: skip
        assert added.report["adapters"][added.name]["slots"] > 0


@pytest.mark.slow
def test_the_report_of_one_among_many_is_that_of_one_alone(built, out, tmp_path):
    base, new, _ = built
    alone = shutil.copytree(out, tmp_path / "alone")
    add_adapter(alone, str(new[2]), base=str(base), level="full")
    outcome = add_adapters(out, list(map(str, new)), base=str(base), level="full")
    assert not outcome.left_out
    file = "adapters/a2.report.json"
    assert (out / file).read_bytes() == (alone / file).read_bytes()


def test_an_adapter_that_peft_cannot_load_is_named(built, out, monkeypatch):
    """The others go on, on a base that is loaded anew."""
    from adaptrix_export.oracle import reference

    base, new, _ = built
    good, seen = reference.with_adapters, []

    def fails(model, adapters):
        seen.append(adapters[0][0])
        if adapters[0][0] == "a0":
            good(model, adapters)  # the model is left half changed
            raise ParityError("adapter a0", "did not arrive")
        return good(model, adapters)

    monkeypatch.setattr(reference, "with_adapters", fails)
    monkeypatch.setattr(module, "prove_each", in_this_process)
    outcome = add_adapters(out, list(map(str, new)), base=str(base), level="fast")
    assert seen == list(NEW)
    assert [a.name for a in outcome.added] == ["a1", "a2"]
    assert "did not arrive" in str(outcome.left_out[0].error)
