"""An adapter moved onto a few layers: what is written, what it keeps, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from adaptrix_export.cli import main
from adaptrix_export.errors import FidelityError, RecipeError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.measure.calibration import Calibration
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.redistribute.moved import beside, factors, truncated
from adaptrix_export.passes.redistribute.redistribute import Redistribute
from adaptrix_export.pipeline import build
from adaptrix_export.plan import LowRank, Plan
from adaptrix_export.plan.composition import Weight
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from tests.artifacts import plan_of as artifact_plan
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import live, save_adapter

DEPTH = {"llama": {"num_hidden_layers": 6}, "gpt2": {"n_layer": 6}}
PROSE = "the quick brown fox jumps over the lazy dog, "
TEXT = Calibration("self", 512, 32)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base_with_tokenizer(request.param, folder / "base", **DEPTH[request.param])
    return base, save_adapter(base, folder / "adapter")


def plan_of(base, adapter):
    opened = open_base(str(base))
    return Plan(opened, (open_adapter(str(adapter), opened),))


def moved(tmp_path, pair, **options):
    """(the plan, its fidelity, the folder of the adapter)"""
    settings = {"layers": (1, 3), "calibration": TEXT, **options}
    with pass_context(Silent()) as context:
        out = Redistribute(**settings, context=context)(plan_of(*pair))
        adapter = out.adapters[0]
        folder = tmp_path / "moved"
        folder.mkdir(parents=True)
        for path in adapter.files:
            (folder / path.name).write_bytes(path.read_bytes())
    return out, out.measured["fidelity"][adapter.name], folder


def add(model, delta, times=1.0):
    """The weight of a plain model with a delta in it, in fp64, rounded once."""
    a, b = factors(delta.terms)
    module = model.get_submodule(delta.site.path)
    added = torch.from_numpy(times * b @ a)
    turned = type(module).__name__ == "Conv1D"
    module.weight.copy_((module.weight.double() + (added.T if turned else added)).float())


def kl(wanted, found):
    wanted, found = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_fit_keeps_more_than_select_and_stock_peft_agrees(tmp_path, pair):
    """The report's KL, computed again from three stock models on the tokens it was measured on."""
    _, selected, _ = moved(tmp_path / "s", pair, strategy="select")
    _, fitted, folder = moved(tmp_path / "f", pair, strategy="fit")
    assert fitted["retained"] > selected["retained"] + 0.1
    base, adapter = pair
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        wanted, without = live(base, adapter)(ids).logits, plain(ids).logits
        found = live(base, folder)(ids).logits
    assert 1 - kl(wanted, found) / kl(wanted, without) > 0.3
    assert (found - without).abs().max() > 1e-3  # PEFT did load it


def test_select_is_the_adapter_with_its_other_layers_off(tmp_path, pair):
    """Independent of every line of ours: the original file with the other layers' B zeroed."""
    _, told, folder = moved(tmp_path, pair, strategy="select")
    base, adapter = pair
    stored = load_file(adapter / "adapter_model.safetensors")
    for key, value in stored.items():
        layer = next(int(part) for part in key.split(".") if part.isdecimal())
        if "lora_B" in key and layer not in (1, 3):
            value.zero_()
    zeroed = tmp_path / "zeroed"
    zeroed.mkdir()
    config = (adapter / "adapter_config.json").read_text()
    (zeroed / "adapter_config.json").write_text(config)
    save_file(stored, zeroed / "adapter_model.safetensors")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        wanted, found = live(base, zeroed)(ids).logits, live(base, folder)(ids).logits
        whole = live(base, adapter)(ids).logits
    assert (wanted - found).abs().max() <= 1e-5 < (wanted - whole).abs().max()
    assert told["sites_after"] < told["sites_before"] and told["bytes_after"] < told["bytes_before"]


def test_the_folder_is_plain_peft_with_its_layers_named(tmp_path, pair):
    out, _, folder = moved(tmp_path, pair)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 3]
    assert config["layers_pattern"] == (
        "h" if (pair[0] / "config.json").read_text().count("gpt2") else "layers"
    )
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, folder)
    live_keys = {n for n, _ in loaded.named_parameters() if "lora_" in n}
    stored = load_file(folder / "adapter_model.safetensors")
    assert {n.replace(".default", "") for n in live_keys} == set(stored)
    assert "calibration=Calibration(text='self'" in out.history[0]
    assert str(tmp_path) not in "".join(out.history)
    assert out.adapters[0].metadata["redistributed"]["config"]["lora_alpha"] == 7


def test_stock_peft_gives_the_logits_of_the_plan_executed(tmp_path, pair):
    """Ranks that differ from site to site, as `fit` makes them: the plan's own deltas, added to the
    base's weights in fp64, against PEFT with the folder as it is."""
    _, _, folder = moved(tmp_path, pair)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    deltas = plan_of(pair[0], folder).adapters[0].deltas
    plain = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        without = plain(ids).logits
        for delta in deltas:
            add(plain, delta)
        wanted, found = plain(ids).logits, live(pair[0], folder)(ids).logits
    assert (found - wanted).abs().max() <= 1e-5 < 1e-3 < (without - wanted).abs().max()


def test_what_the_source_says_of_itself_is_kept_with_where_it_came_from(tmp_path, pair):
    _, _, first = moved(tmp_path / "one", pair, layers=(1, 2, 3))
    out, told, _ = moved(tmp_path / "two", (pair[0], first), layers=(1, 3))
    said = out.adapters[0].metadata["redistributed"]
    assert "layers=(1, 3)" in said["step"] and said["retained"] == told["retained"]
    assert "layers=(1, 2, 3)" in said["before"]["step"]
    assert said["before"]["config"]["lora_alpha"] == 7
    config = json.loads((tmp_path / "two" / "moved" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_composed_adapters_are_moved_as_what_they_are_together(tmp_path, pair):
    """Two ranks, two alphas and a weight: onto all layers by `fold`, which then loses nothing but
    rounding, against the two stock models' changes of one weight after another."""
    base, adapter = pair
    other = save_adapter(base, tmp_path / "other", seed=5, r=3, lora_alpha=2)
    plan = artifact_plan(base, adapter, other)
    count = plan.base.architecture.stacks[0].count
    with pass_context(Silent()) as context:
        step = Redistribute(layers=count, strategy="fold", calibration=TEXT, context=context)
        composed = Compose(weights=(("other", Weight(0.5)),))(plan)
        out = step(composed)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        ids = torch.arange(30)[None]
        with torch.no_grad():
            for one, weight in ((plan.adapters[0], 1.0), (plan.adapters[1], 0.5)):
                for delta in one.deltas:
                    add(plain, delta, weight)
            wanted = plain(ids).logits
            found = live(base, out.adapters[0].folder)(ids).logits
    assert (wanted - found).abs().max() <= 1e-4
    (told,) = out.measured["fidelity"].values()
    assert told["retained"] == pytest.approx(1, abs=1e-5)


def test_same_inputs_same_bytes(tmp_path, pair):
    files = [moved(tmp_path / name, pair)[2] for name in ("one", "two")]
    one, two = ((folder / "adapter_model.safetensors").read_bytes() for folder in files)
    assert one == two


def test_an_adapter_on_the_target_layers_alone_is_left_as_it_is(tmp_path, pair):
    base, _ = pair
    modules = ["q_proj", "down_proj", "c_attn", "c_proj"]  # those of either family
    few = {"layers_to_transform": [1, 3], "target_modules": modules}
    adapter = save_adapter(base, tmp_path / "few", **few)
    _, told, folder = moved(tmp_path, (base, adapter), layers=(1, 3, 4))
    assert told["retained"] == pytest.approx(1, abs=1e-6) and "left as it is" in told["notes"][0]
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, folder))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_of_one_layer(tmp_path):
    base = save_base_with_tokenizer("llama", tmp_path / "base", num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "adapter")
    _, told, _ = moved(tmp_path, (base, adapter), layers="auto")
    assert told["layers"] == [0] and told["retained"] == pytest.approx(1, abs=1e-6)


def test_a_calibration_text_of_ten_tokens(tmp_path, pair):
    text = tmp_path / "short.txt"
    text.write_text("!?" * 5)
    _, told, _ = moved(tmp_path, pair, calibration=Calibration(str(text)))
    assert "only 1" in told["notes"][0] and np.isfinite(told["retained"])
    text.write_text("!?")
    with pytest.raises(RecipeError, match="longer text"):
        moved(tmp_path / "again", pair, calibration=Calibration(str(text)))


def test_ten_tokens_are_one_row_which_distill_refuses(tmp_path, pair):
    text = tmp_path / "short.txt"
    text.write_text("!?" * 5)
    with pytest.raises(UnsupportedError, match="one row of calibration text"):
        moved(tmp_path, pair, calibration=Calibration(str(text)), strategy="distill")


@pytest.mark.parametrize("strategy", ["fold", "fit", "distill"])
def test_a_rank_as_large_as_the_model_is_wide(tmp_path, pair, strategy):
    """The largest that means anything: no site then needs fewer factors than it has columns."""
    _, told, folder = moved(tmp_path, pair, strategy=strategy, rank=64, steps=2)
    assert told["rank"] == 64 and np.isfinite(told["retained"])
    with torch.no_grad():
        assert live(pair[0], folder)(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"layers": (1, 99)}, {"layers": (1, 1)}, {"rank": 1000}, {"strategy": "copy"}]
)
def test_what_cannot_be_meant_is_refused(tmp_path, pair, options):
    with pytest.raises(RecipeError):
        moved(tmp_path, pair, **options)


def test_what_cannot_be_moved_is_refused_by_name(tmp_path, pair):
    base, _ = pair
    adapter = save_adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedError, match="Dora"):
        moved(tmp_path, (base, adapter))


def test_too_little_retained_fails_with_what_was_measured(tmp_path, pair):
    with pytest.raises(FidelityError) as caught:
        moved(tmp_path, pair, strategy="select", min_retained=0.99)
    assert caught.value.exit_code == 1
    assert caught.value.report["fidelity"]["adapter"]["retained"] < 0.99


def test_too_little_retained_publishes_nothing_and_exits_with_1(tmp_path, pair):
    base, adapter = pair
    text = tmp_path / "text.txt"
    text.write_text(PROSE * 60)
    arguments = [
        "redistribute", str(base), str(adapter), "--layers", "1,3", "--strategy", "select",
        "--tokens", "256", "--calibration", str(text), "--out", str(tmp_path / "out"),
        "--parity", "off", "--min-retained",
    ]  # fmt: skip
    done = CliRunner().invoke(main, [*arguments, "0.999"])
    assert done.exit_code == 1, done.output
    assert "retained" in done.output and "at least 0.999" in done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, [*arguments, "0", "--json"])
    assert done.exit_code == 0, done.output
    (told,) = json.loads(done.stdout)["fidelity"].values()
    assert told["calibration"] == {"text": "text.txt", "tokens": 256, "length": 256, "seed": 0}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["fidelity"]["adapter"]["calibration"] == told["calibration"]


def test_distill_keeps_more_than_fit(tmp_path, pair):
    _, fitted, _ = moved(tmp_path / "f", pair)
    out, told, _ = moved(tmp_path / "d", pair, strategy="distill", steps=40)
    assert told["retained"] > fitted["retained"]
    assert told["distilled"]["unseen_after"] < told["distilled"]["unseen_before"]
    ranks = {t.rank for d in out.adapters[0].deltas for t in d.terms}
    assert len(ranks) == 1


def test_search_stays_within_its_budget(tmp_path, pair):
    sites = len({d.site.module for d in plan_of(*pair).adapters[0].deltas})
    _, told, _ = moved(tmp_path, pair, layers="search", max_sites=2 * sites, strategy="select")
    assert told["sites_after"] <= 2 * sites and len(told["layers"]) == 2


def test_search_within_a_number_of_bytes(tmp_path, pair):
    _, one, _ = moved(tmp_path / "a", pair, layers=(1,), strategy="fit")
    _, told, _ = moved(tmp_path / "b", pair, layers="search", max_bytes=300_000)
    assert one["bytes_after"] <= told["bytes_after"] <= 300_000 < told["bytes_before"] * 4
    with pytest.raises(RecipeError, match="one layer takes that"):
        moved(tmp_path / "c", pair, layers="search", max_bytes=100)
    with pytest.raises(RecipeError, match="without a budget"):
        moved(tmp_path / "d", pair, layers="search")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with a LoRA on attention and feed-forward."""
    folder = tmp_path_factory.mktemp("bert")
    options = {"num_hidden_layers": 6, "initializer_range": 0.15}
    base = save_base_with_tokenizer("bert", folder / "base", **options)
    torch.manual_seed(1)
    modules = ["query", "value", "intermediate.dense", "output.dense"]
    peft = get_peft_model(
        AutoModel.from_pretrained(base), LoraConfig(r=4, lora_alpha=7, target_modules=modules)
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def test_an_encoder_is_moved_by_the_error_of_its_features(tmp_path, encoder):
    """The figure of the report, computed again from three stock models on text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} {PROSE}" for i in range(400)))
    options = {"layers": "auto", "calibration": Calibration(str(text), 1024, 32)}
    _, selected, _ = moved(tmp_path / "s", encoder, strategy="select", **options)
    _, fitted, folder = moved(tmp_path / "f", encoder, strategy="fit", **options)
    _, distilled, _ = moved(tmp_path / "d", encoder, strategy="distill", steps=20, **options)
    assert fitted["layers"] == [1, 3, 4] and fitted["cosine"] > fitted["cosine_base"]
    assert fitted["measure"] == "relative squared error of features" and "gain" not in fitted
    assert distilled["retained"] > fitted["retained"] > selected["retained"] + 0.1
    base, adapter = encoder
    ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = AutoModel.from_pretrained(base).eval()
        without = plain(ids).last_hidden_state
        wanted, found = (
            PeftModel.from_pretrained(AutoModel.from_pretrained(base), f)
            .eval()(input_ids=ids)
            .last_hidden_state
            for f in (adapter, folder)
        )
    kept = 1 - (wanted - found).square().sum() / (wanted - without).square().sum()
    assert kept > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["peft", "onnx"])
def test_a_build_publishes_it_proved_and_verify_proves_it_again(tmp_path, pair, target):
    base, adapter = pair
    wanted = Recipe(
        base=str(base), adapters=[str(adapter)], target=target, out=tmp_path / "out",
        redistribute={"layers": [1, 3], "calibration": {"tokens": 256, "length": 32}},
        parity={"level": "fast"},
    )  # fmt: skip
    outcome = build(wanted)
    assert outcome.report["passed"] and "redistributed" in outcome.report["oracle"]
    assert outcome.report["fidelity"]["adapter"]["layers"] == [1, 3]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    again = verify_artifact(tmp_path / "out", base=str(base), adapters=[str(adapter)])
    assert again["parity"]["passed"] and "redistributed" in again["parity"]["oracle"]


def test_a_published_peft_folder_that_says_another_scale_fails_its_proof(
    tmp_path, pair, monkeypatch
):
    """The negative control: PEFT and our own reading of the folder must be able to differ."""
    from adaptrix_export.graph.expression import TensorRef
    from adaptrix_export.oracle.job import Job
    from adaptrix_export.prove import dense
    from adaptrix_export.prove.child import run

    base, adapter = pair
    plan = plan_of(base, adapter)
    real = dense.dense_plan

    def wrong(job):
        found = real(job)
        first = found.adapters[0].deltas[0]
        term = first.terms[0]
        other = LowRank(term.a, term.b, 1.01 * term.scale)
        object.__setattr__(first, "terms", (other,))
        return found

    monkeypatch.setattr(dense, "dense_plan", wrong)
    job = Job(
        target="peft", artifact=adapter, base_folder=base, precision="fp32",
        weights={name: TensorRef(name) for name in plan.changes()},
        adapters=(("adapter", adapter),), level="fast",
    )  # fmt: skip
    report = run(job, Silent())
    assert not report["passed"] and report["replay"]["failed"] == 1


def test_sums_and_truncation_of_factors(pair):
    """Against dense matrices in fp64."""
    held = [d.terms for d in plan_of(*pair).adapters[0].deltas if d.site.module.endswith("proj")][
        :2
    ]
    same = [t for t in held if factors(t)[0].shape == factors(held[0])[0].shape]
    pairs = [factors(terms) for terms in same]
    a, b = beside(pairs)
    assert np.allclose(b @ a, sum(y @ x for x, y in pairs), atol=1e-12)
    x, y = truncated((a, b), 2)
    u, s, vt = np.linalg.svd(b @ a)
    assert np.allclose(y @ x, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-10)
