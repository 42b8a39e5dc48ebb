"""Switchable graphs: slots as planned, the base bit for bit, files that anyone can load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file

from adaptrix_export.errors import RecipeError, UnsupportedError
from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.pipeline import build
from adaptrix_export.prove.report import summary
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.stamps import adapter_version
from adaptrix_export.targets.adapter_file import write_adapter
from tests.artifacts import plan_of
from tests.switchable import recipe, switchable
from tests.tiny import VOCAB, live, save_adapter, save_base

IDS = np.random.default_rng(0).integers(3, VOCAB, (1, 24))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return switchable("llama", tmp_path_factory.mktemp("llama"), parity={"level": "off"})


def feeds(session, ids=IDS):
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            _, heads, _, size = value.shape
            given[value.name] = np.zeros((len(ids), heads, 0, size), np.float32)
    return {n: v for n, v in given.items() if n in {i.name for i in session.get_inputs()}}


def opened(folder, file="model.onnx"):
    return ort.InferenceSession(str(located(folder, file)), providers=["CPUExecutionProvider"])


def test_base_alone_is_the_base_graph_bit_for_bit(llama, tmp_path):
    from adaptrix_export.plan import Plan
    from adaptrix_export.progress import Silent
    from adaptrix_export.targets.merged_onnx import lower_merged_onnx

    plan = plan_of(llama.base)
    lower_merged_onnx(Plan(plan.base, ()), tmp_path, Silent())
    expected = opened(tmp_path)
    theirs = expected.run(None, feeds(expected))
    for file in ("model.onnx", SLOTLESS):
        base = opened(llama.out, file)
        ours = base.run(None, feeds(base))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any("lora" in value.name for value in base.get_overridable_initializers())
    files = [
        ir.load(located(llama.out, file)).graph.initializers for file in ("model.onnx", SLOTLESS)
    ]
    slots, alone = (
        {n: (t.offset, t.length) for n, v in found.items()
         if isinstance(t := v.const_value, ir.ExternalTensor)}
        for found in files
    )  # fmt: skip
    assert alone and alone.items() <= slots.items()  # no weight is there twice


def test_onnxruntime_applies_the_files_through_run_options(llama):
    """Each adapter against its own live PEFT model; and not one adapter's output is another's."""
    session = opened(llama.out)
    found = {}
    for name, folder in llama.adapters.items():
        adapter = ort.LoraAdapter()
        adapter.Load(str(llama.out / "adapters" / f"{name}.onnx_adapter"))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        found[name] = session.run(["logits"], feeds(session), options)[0]
        with torch.no_grad():
            expected = live(llama.base, folder)(torch.tensor(IDS)).logits.numpy()
        assert np.abs(found[name] - expected).max() < 1e-4
    base = session.run(["logits"], feeds(session))[0]
    every = [base, *found.values()]
    for i, one in enumerate(every):  # the negative control: 1e-4 tells all of them apart
        assert all(np.abs(one - other).max() > 0.01 for other in every[:i])


def test_slots_are_the_union_of_sites_each_with_one_pair_of_factors(llama):
    slots = llama.outcome.manifest["switchable"]["slots"]
    assert len(slots) == 4 * 7  # query, key and value have their own, though one MatMul makes them
    value = next(s for s in slots if s["name"] == "model.layers.0.self_attn.v_proj")
    assert value["members"] == [["model.layers.0.self_attn.v_proj", [0, 32], [0, 32]]]
    graph = {v.name for v in opened(llama.out).get_overridable_initializers()}
    assert graph == {s[k] for s in slots for k in "ab"}
    read = ort.AdapterFormat.read_adapter
    for name, entry in llama.outcome.manifest["switchable"]["adapters"].items():
        file = read(str(llama.out / entry["file"]))
        values = {n: v.numpy() for n, v in file.get_parameters().items()}
        assert values.keys() <= graph
        assert file.get_adapter_version() == entry["version"] == adapter_version(values)
        assert file.get_model_version() == llama.outcome.manifest["switchable"]["model_version"]
        sizes = json.loads((llama.adapters[name] / "adapter_config.json").read_text())
        shipped = load_file(llama.adapters[name] / "adapter_model.safetensors")
        assert sum(v.size for v in values.values()) == sum(v.size for v in shipped.values())
        if name == "attention":
            key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
            scaled = shipped[key].T * np.float64(sizes["lora_alpha"] / sizes["r"])
            np.testing.assert_array_equal(values[value["b"]], scaled.astype("f"))


def test_same_inputs_same_bytes(llama, tmp_path):
    again = build(recipe(llama.base, llama.adapters, tmp_path / "out", parity={"level": "off"}))
    assert again.manifest["outputs"] == llama.outcome.manifest["outputs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_proof_covers_every_adapter_and_the_base(tmp_path, kind):
    report = switchable(kind, tmp_path).outcome.report
    assert report["passed"] and report["replay"]["changed"] == 0
    for mode in ("base alone", "attention", "all", "mlp"):
        cases = {c["name"]: c for c in report["cases"] if c["name"].startswith(f"{mode}: ")}
        assert len(cases) == 5 and max(c["max_abs"] for c in cases.values()) < 1e-4
    assert {a["worst"] <= 1 for a in report["adapters"].values()} == {True}


def test_the_artifact_as_it_is_passes(llama):
    report = llama.proof()
    assert report["passed"], summary(ReportDocument.of(report))
    assert len(report["cases"]) == (4 + 1) * 2  # the base twice: with slots and without


def test_a_wrong_graph_without_slots_fails_the_proof(llama, tmp_path):
    shutil.copytree(llama.out, tmp_path / "out")
    model = ir.load(located(tmp_path / "out", SLOTLESS))
    norm = next(n for n in model.graph if "Norm" in n.op_type)
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    ir.save(model, located(tmp_path / "out", SLOTLESS))
    report = replace(llama, out=tmp_path / "out").proof()
    wrong = {case["name"] for case in report["cases"] if not case["passed"]}
    assert not report["passed"] and len(wrong) == 2
    assert all(name.startswith("base alone, without slots: ") for name in wrong)


@pytest.mark.parametrize(
    "fault",
    ["scaled", "stray", *(pytest.param(f, marks=pytest.mark.slow) for f in ("swapped", "missing"))],
)
def test_a_wrong_adapter_file_fails_the_proof(llama, tmp_path, monkeypatch, fault):
    from adaptrix_export.targets import switchable_onnx

    right = switchable_onnx.slot_values

    def wrong(slots, adapter, shares):
        values = right(slots, adapter, shares)
        if adapter.name != "attention":
            return values
        name = next(n for n in values if n.endswith("lora_B"))
        if fault == "scaled":
            values[name] = values[name] * np.float32(1.0001)
        elif fault == "swapped":
            values[name] = values[name][::-1].copy()
        elif fault == "missing":
            del values[name], values[name.replace("lora_B", "lora_A")]
        else:
            alone = next(slot for slot in slots if slot.a not in values)
            values[alone.a] = np.zeros((alone.inputs, 1), np.float32)
            values[alone.b] = np.full((1, alone.outputs), 1e-6, np.float32)
        return values

    monkeypatch.setattr(switchable_onnx, "slot_values", wrong)
    only = {"attention": llama.adapters["attention"]}
    if fault == "stray":  # in the slot of a module that only others adapt
        only = llama.adapters
    off = {"parity": {"level": "off"}}
    made = build(recipe(llama.base, only, tmp_path / "out", **off))
    report = replace(llama, adapters=only, out=tmp_path / "out", outcome=made).proof()
    assert not report["passed"] and not report["adapters"]["attention"]["passed"]
    assert "factors of attention, first at model.layers.0" in summary(ReportDocument.of(report))
    base = [c for c in report["cases"] if c["name"].startswith("base alone")]
    assert all(c["passed"] for c in base) and report["replay"]["passed"]


REFUSED = {
    "dora": ({"use_dora": True}, "Dora, which no slot can hold"),
    "bias": ({"bias": "all"}, "a trained row or bias"),
    "saved": ({"modules_to_save": ["lm_head"]}, "a module saved whole"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "an embedding"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_slot_can_hold_is_refused_by_name(tmp_path, kind):
    options, reason = REFUSED[kind]
    base = save_base(
        "llama", tmp_path / "base", tie_word_embeddings=False, attention_bias=kind == "bias"
    )
    adapter = save_adapter(base, tmp_path / "odd", **{"target_modules": ["q_proj"], **options})
    with pytest.raises(UnsupportedError, match=reason):
        build(recipe(base, {"odd": adapter}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_belong_to_their_target(llama, tmp_path):
    with pytest.raises(RecipeError, match="rows with target onnx"):
        recipe(llama.base, llama.adapters, tmp_path / "o", target="onnx", rows=True)


def test_an_adapter_file_is_what_onnxruntime_writes(tmp_path):
    """Tensors, shapes and stamps read back by ONNX Runtime; empty and odd sizes included."""
    random = np.random.default_rng(1)
    values = {
        f"x.{i}": random.normal(size=s).astype("f") for i, s in enumerate([(3, 5), (1, 7), (4, 0)])
    }
    version, _ = write_adapter(tmp_path / "a.onnx_adapter", values, 11)
    read = ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    assert (read.get_adapter_version(), read.get_model_version()) == (version, 11)
    found = {n: v.numpy() for n, v in read.get_parameters().items()}
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[n], values[n]) for n in values)
    write_adapter(tmp_path / "b.onnx_adapter", dict(reversed(values.items())), 11)
    assert (tmp_path / "a.onnx_adapter").read_bytes() == (tmp_path / "b.onnx_adapter").read_bytes()


@pytest.mark.slow
def test_rows_are_proved_alone_and_mixed(tmp_path):
    outcome = switchable("llama", tmp_path, rows=True).outcome
    names = [c["name"] for c in outcome.report["cases"]]
    assert sum(n.startswith("rows of ") for n in names) == 4 and outcome.report["passed"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["switchable"]["rows"]
    assert {n: a["worst"] <= 1 for n, a in outcome.report["adapters"].items()} == {
        "attention": True, "all": True, "mlp": True,
    }  # fmt: skip


def test_two_rows_exchanged_fail_the_proof(llama, tmp_path, monkeypatch):
    from adaptrix_export.targets import switchable_onnx

    right = switchable_onnx.stacked

    def wrong(slots, adapters, shares):
        values, owners = right(slots, adapters, shares)
        return values, {name: 1 - whose for name, whose in owners.items()}

    monkeypatch.setattr(switchable_onnx, "stacked", wrong)
    two = {name: llama.adapters[name] for name in ("attention", "mlp")}
    off = {"parity": {"level": "off"}, "rows": True}
    made = build(recipe(llama.base, two, tmp_path / "out", **off))
    report = replace(llama, adapters=two, out=tmp_path / "out", outcome=made).proof()
    assert not report["passed"]
    assert not any(adapter["passed"] for adapter in report["adapters"].values())
    failed = {case["name"].split(":")[0] for case in report["cases"] if not case["passed"]}
    assert failed == {"attention", "mlp"}
