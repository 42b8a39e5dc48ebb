"""Context gates behind slots: each adapter through its own, the base alone bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from adaptrix_export.cli import main
from adaptrix_export.errors import AdapterError, ParityError, UnsupportedError
from adaptrix_export.graph.rewrite.gate_functions import DOMAIN
from adaptrix_export.manage.add_adapter import add_adapter
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.package.documents import ManifestDocument, ReportDocument
from adaptrix_export.pipeline import build
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.prove.proof import gates_of
from adaptrix_export.prove.report import summary
from adaptrix_export.runtime import Session
from adaptrix_export.runtime.layout import located
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.switchable import recipe, switchable
from tests.tiny import VOCAB, save_adapter

OFF = {"parity": {"level": "off"}}
TAU = 0.3  # clamps some of the tokens of each of these adapters, not all
IDS = np.random.default_rng(0).integers(3, VOCAB, (1, 24))


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    context = {"tau": TAU, "stats": True}
    return switchable("llama", tmp_path_factory.mktemp("gated"), context=context, **OFF)


def proof(made, **changed):
    return made.proof(**{"gates": gates_of(ManifestDocument.of(made.outcome.manifest)), **changed})


def test_every_adapter_is_proved_through_its_gates(gated):
    report = proof(gated)
    assert report["passed"], summary(ReportDocument.of(report))
    assert "each adapter by itself, with the plan's gates" in report["oracle"]
    names = {check["name"] for check in report["context"]["checks"]}
    sides = ("prefill", "left-padded", "right-padded")
    assert names == {"function nodes"} | {
        f"{name}: statistics, {side}" for name in gated.adapters for side in sides
    }
    lines = report["context"]["sites"]
    count = {name: sum(line["adapter"] == name for line in lines) for name in gated.adapters}
    assert count == {"attention": 8, "all": 28, "mlp": 4}
    for name in gated.adapters:  # each is clamped somewhere
        assert max(line["clamped"] for line in lines if line["adapter"] == name) > 0
    assert 0.1 < np.mean([line["clamped"] for line in lines]) < 0.9


@pytest.mark.parametrize("fault", ["none", "loose", "one"])
def test_other_gates_than_those_of_the_plan_fail_the_proof(gated, fault):
    gates = gates_of(ManifestDocument.of(gated.outcome.manifest))
    wrong = {
        "none": (),
        "loose": tuple(replace(gate, tau=gate.tau * 1.05) for gate in gates),
        "one": tuple(
            replace(g, tau=g.tau * 2) if g.site.endswith("2.self_attn.v_proj") else g for g in gates
        ),
    }[fault]
    report = proof(gated, gates=wrong)
    assert not report["passed"]
    failed = {c["name"].split(":")[0] for c in report["cases"] if not c["passed"]}
    assert failed <= {"attention", "all", "mlp"}  # the base alone is right whatever the gates are
    if fault != "one":
        assert failed == {"attention", "all", "mlp"}
    else:
        assert "gates: function nodes" in summary(ReportDocument.of(report))


def test_the_base_alone_is_the_base_graph_bit_for_bit(gated, tmp_path):
    plan = plan_of(gated.base)
    lower_merged_onnx(Plan(plan.base, ()), tmp_path, Silent())
    found = Session(gated.out, threads=1).logits(IDS, adapter=None)
    assert np.array_equal(found, Session(tmp_path, threads=1).logits(IDS))


def test_a_site_has_one_node_and_other_layers_none(gated, tmp_path):
    few = build(
        recipe(gated.base, gated.adapters, tmp_path / "out", context={"tau": {1: 0.1}}, **OFF)
    )
    for made, count in ((gated.outcome, 28), (few, 7)):
        model = ir.load(located(made.out, "model.onnx"))
        nodes = {node.name for node in model.graph if node.domain == DOMAIN}
        assert nodes == {gate["site"] for gate in made.manifest["context"]["gates"]}
        assert len(nodes) == count
    versions = {m.manifest["switchable"]["model_version"] for m in (gated.outcome, few)}
    assert len(versions) == 2  # a file for other gates is refused


def test_statistics_are_those_of_the_adapter_at_hand(gated):
    session = Session(gated.out, threads=1)
    ids = IDS[0].tolist()
    own = session.context(ids, adapter="mlp")
    assert [s.site for s in own] == [g["site"] for g in gated.outcome.manifest["context"]["gates"]]
    adapted = {f"model.layers.{n}.mlp.{m}_proj" for n in (1, 3) for m in ("up", "down")}
    for site in own:
        assert (site.gate_min < 1) == (site.clamped > 0)
        if site.site not in adapted:
            assert (site.gate_mean, site.gate_min, site.clamped) == (1, 1, 0)
    assert any(site.clamped for site in own if site.site in adapted)
    assert all(site.gate_min == 1 for site in session.context(ids, adapter=None))
    asked = ["run", str(gated.out), "--prompt", "the fox", "--max-new-tokens", "3", "--json"]
    done = CliRunner().invoke(main, [*asked, "--adapter", "mlp", "--context-stats"])
    assert done.exit_code == 0, done.output
    told = {line["site"] for line in json.loads(done.stdout)["context"] if line["clamped"]}
    assert told and told <= adapted


def test_a_mix_is_clamped_as_one_contribution(gated):
    """Against PEFT with both adapters active and the same clamp on what they add together."""
    pair = tuple((name, gated.adapters[name]) for name in ("attention", "mlp"))
    job = Job("onnx-switchable", gated.out, gated.base, "fp32", weights={}, adapters=pair)
    oracle = Reference.open(job)
    own = oracle.put_gates(gates_of(ManifestDocument.of(gated.outcome.manifest)))
    assert len(own) == 8 + 4
    session = Session(gated.out, threads=1)
    found = session.logits(IDS, adapter={"attention": 1.0, "mlp": 1.0})
    expected = oracle.prefill(IDS[0].tolist())
    assert np.abs(found[0] - expected).max() < 1e-4
    assert np.abs(session.logits(IDS, adapter="attention")[0] - expected).max() > 0.01


@pytest.mark.parametrize("mode", ["mask", "blend"])
def test_other_modes(gated, tmp_path, mode):
    weight = {"weight": {1: 0.5, 3: -0.25}} if mode == "blend" else {}
    only = {"mlp": gated.adapters["mlp"]}
    context = {"mode": mode, **weight}
    made = replace(
        gated, adapters=only, out=tmp_path / "out",
        outcome=build(recipe(gated.base, only, tmp_path / "out", context=context, **OFF)),
    )  # fmt: skip
    report = proof(made)
    assert report["passed"], summary(ReportDocument.of(report))
    plain = proof(made, gates=())
    assert plain["adapters"]["mlp"]["passed"] == (mode == "mask")
    assert plain["passed"] == (mode == "mask")  # which without padding lets all through
    nodes = [n for n in ir.load(located(made.out, "model.onnx")).graph if n.domain == DOMAIN]
    assert len(nodes) == (4 if mode == "mask" else 0)


def test_what_cannot_be_gated_is_refused_or_left_as_it_is(gated, tmp_path):
    """A head is outside the layers: no gate, and with `drop` a slot without one."""
    base = save_base_with_tokenizer("llama", tmp_path / "base", tie_word_embeddings=False)
    head = save_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    without_embeddings(head)
    options = {"context": {"tau": TAU}, **OFF}
    with pytest.raises(UnsupportedError, match="clamp gate outside the layers"):
        build(recipe(base, {"head": head}, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    outcome = build(recipe(base, {"head": head}, tmp_path / "out", on_mismatch="drop", **options))
    assert any("lm_head: not gated" in note for note in outcome.notes)
    assert len(outcome.manifest["context"]["gates"]) == 4
    made = replace(gated, base=base, adapters={"head": head}, out=tmp_path / "out", outcome=outcome)
    report = proof(made)
    assert report["passed"], summary(ReportDocument.of(report))
    with pytest.raises(AdapterError, match="layer 9: no site of an adapter"):
        build(recipe(gated.base, gated.adapters, tmp_path / "no", context={"tau": {9: 0.1}}, **OFF))


def without_embeddings(folder):
    """PEFT saves a whole head beside its LoRA; take it out."""
    file = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "lora_" in k}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_whole_builds_are_proved_and_verified_again(tmp_path, kind):
    made = switchable(kind, tmp_path, context={"tau": TAU, "scope": "layer", "stats": True})
    assert made.outcome.report["passed"]
    sources = [str(folder) for folder in made.adapters.values()]
    again = verify_artifact(made.out, base=str(made.base), adapters=sources)
    assert again["parity"]["context"]["passed"]


@pytest.mark.slow
def test_rows_go_through_the_gates_of_their_adapters(tmp_path):
    made = switchable("llama", tmp_path, rows=True, context={"tau": TAU, "stats": True})
    report = made.outcome.report
    assert report["passed"] and sum(c["name"].startswith("rows of ") for c in report["cases"]) == 4
    assert not proof(made, gates=(), level="full")["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("context", [{"tau": TAU}, {"mode": "blend", "weight": 0.5}])
def test_an_adapter_that_is_added_has_the_same_gates(gated, tmp_path, context, monkeypatch):
    two = {name: gated.adapters[name] for name in ("all", "mlp")}
    build(recipe(gated.base, two, tmp_path / "out", context=context, **OFF))
    late, base = str(gated.adapters["attention"]), str(gated.base)
    spare = shutil.copytree(tmp_path / "out", tmp_path / "spare")
    added = add_adapter(tmp_path / "out", late, "late", base=base, level="fast")
    assert added.report["passed"] and "gates as forward hooks" in added.report["oracle"]
    monkeypatch.setattr("adaptrix_export.manage.add_adapter.gates_of", lambda manifest: ())
    if "tau" in context:  # a proof that forgot the gates of the graph
        with pytest.raises(ParityError):
            add_adapter(spare, late, "late", base=base, level="fast")
    else:  # the file holds the share
        files = [out / "adapters" / "late.onnx_adapter" for out in (tmp_path / "out", spare)]
        add_adapter(spare, late, "late", base=base, level="off")
        one, whole = (ort.AdapterFormat.read_adapter(str(f)).get_parameters() for f in files)
        for name, value in whole.items():
            share = 0.5 if name.endswith("lora_B") else 1
            assert np.array_equal(one[name].numpy(), value.numpy() * np.float32(share))


@pytest.mark.slow
def test_a_calibrated_tau_leaves_its_share_alone_under_every_adapter(tmp_path):
    context = {"tau": "calibrated", "share": 0.5, "stats": True}
    made = switchable("llama", tmp_path, context=context)
    assert made.outcome.report["passed"]
    gates = made.outcome.manifest["context"]["gates"]
    assert len({gate["tau"] for gate in gates}) == 1
    session = Session(made.out, threads=1)
    words = session.tokenizer.encode("the quick brown fox jumps over the lazy dog " * 3)
    clamped = [max(s.clamped for s in session.context(words, adapter=n)) for n in made.adapters]
    assert max(clamped) < 1


@pytest.mark.slow
def test_an_approximated_adapter_is_gated_too(tmp_path):
    base = save_base_with_tokenizer("llama", tmp_path / "base", initializer_range=0.15)
    options = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"]}
    dora = save_adapter(base, tmp_path / "dora", use_dora=True, **options)
    slots = {"approximate": "svd", "rank": 8}
    report = build(
        recipe(base, {"dora": dora}, tmp_path / "out", slots=slots, context={"tau": TAU})
    ).report
    assert report["passed"] and {line["adapter"] for line in report["context"]["sites"]} == {"dora"}
    assert "gates as forward hooks" in report["oracle"]
    assert report["oracle"].endswith("with dora approximated by SVD")


@pytest.mark.slow
def test_onnxruntime_genai_runs_the_gates(gated):
    genai = pytest.importorskip("onnxruntime_genai")
    session = Session(gated.out, threads=1)
    model = genai.Model(str(gated.out))
    adapters = genai.Adapters(model)
    prompt = IDS[0, :9].tolist()
    for name in gated.adapters:
        adapters.load(str(gated.out / "adapters" / f"{name}.onnx_adapter"), name)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 24, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        theirs = []
        while len(theirs) < 24 and not generator.is_done():
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        ours = session.generate_ids(prompt, 24, stop_at_eos=False, adapter=name)
        assert theirs == ours[: len(theirs)] and len(theirs) > 3
