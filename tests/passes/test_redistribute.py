"""An adapter moved onto a few layers: what is written, what it keeps, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import FidelityError, RecipeError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.passes.calibration import Calibration
from adaptrix_export.passes.moved import beside, factors, truncated
from adaptrix_export.passes.redistribute import Redistribute
from adaptrix_export.passes.workshop import workshop
from adaptrix_export.pipeline import build
from adaptrix_export.plan import LowRank, Plan
from adaptrix_export.progress import Silent
from adaptrix_export.published import verify_artifact
from adaptrix_export.recipe import Recipe
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import live, save_adapter

DEPTH = {"llama": {"num_hidden_layers": 6}, "gpt2": {"n_layer": 6}}
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
    with workshop(Silent()) as shop:
        out = Redistribute(**settings, workshop=shop)(plan_of(*pair))
        adapter = out.adapters[0]
        folder = tmp_path / "moved"
        folder.mkdir(parents=True)
        for path in adapter.files:
            (folder / path.name).write_bytes(path.read_bytes())
    return out, out.measured["fidelity"][adapter.name], folder


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
    from adaptrix_export.check import dense
    from adaptrix_export.check.child import run
    from adaptrix_export.check.job import Job
    from adaptrix_export.lower.weights import tensor

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
        weights={name: tensor(name) for name in plan.changes()},
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
