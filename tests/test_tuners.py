"""Every tuner of PEFT that merges, against its live model; every other one refused by name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.adapters.prompt_adapter import KINDS as PROMPTS
from adaptrix_export.load.adapters.tuners import REFUSED, TUNERS
from adaptrix_export.load.adapters.tuners import REPLACING as REPLACING_ROWS
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.merge import tuned
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.peft_layers import Skeleton
from adaptrix_export.oracle.live import live_parameter
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.pipeline import build
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.targets import TARGETS
from tests.tiny import VOCAB, live, save_base
from tests.tuned import CONV1D, LINEAR, REPLACING, options_of, save_tuned

EVERY = [("llama", kind) for kind in (*LINEAR, *REPLACING)] + [("gpt2", kind) for kind in CONV1D]
IDS = torch.arange(40).remainder(VOCAB).view(2, 20)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_base("llama", folder / "llama"),
        "gpt2": with_biases(save_base("gpt2", folder / "gpt2")),
        "biased": with_biases(save_base("llama", folder / "biased", attention_bias=True, seed=3)),
    }


def with_biases(folder):
    """Biases start as zero, and a tuner that scales them would do nothing."""
    path = folder / "model.safetensors"
    torch.manual_seed(4)
    tensors = load_file(path)
    moved = {n: 0.2 * torch.randn_like(t) for n, t in tensors.items() if n.endswith(".bias")}
    save_file({**tensors, **moved}, path, {"format": "pt"})
    return folder


def plan_of(base, adapter):
    opened = open_base(str(base))
    return verify(Plan(opened, (open_adapter(str(adapter), opened),)))


def artifact_logits(plan, folder):
    folder.mkdir()
    artifact = TARGETS["safetensors"].lower(plan, folder, Silent())
    config = {**plan.base.config, **artifact.config_changes}
    (folder / "config.json").write_text(json.dumps(config))
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_merged_logits_are_those_of_the_live_model(tmp_path, bases, model, kind):
    base = bases[model]
    adapter = save_tuned(base, tmp_path / "a", kind, **options_of(kind, model))
    ours = artifact_logits(plan_of(base, adapter), tmp_path / "out")
    theirs = logits(live(base, adapter))
    assert difference(ours, theirs) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert difference(theirs, logits(plain)) > 1e-3  # or the line above would prove nothing
    assert not tuned._skeletons  # the skeleton is gone


@pytest.mark.parametrize("kind", ["BEFT", "GLORA", "IA3", "ROAD"])
def test_tuners_that_change_biases(tmp_path, bases, kind):
    base = bases["biased"]
    targets = {"target_modules": ["q_proj", "k_proj"], "r": 4}
    if kind in ("BEFT", "IA3", "ROAD"):
        del targets["r"]
    options = {"ROAD": dict(group_size=16), "IA3": dict(feedforward_modules=[])}.get(kind, {})
    if kind == "GLORA":
        options = dict(config_A_B="vector", config_C="lora", config_D_E="vector")
    adapter = save_tuned(base, tmp_path / "a", kind, **targets, **options)
    plan = plan_of(base, adapter)
    assert {d.parameter for d in plan.adapters[0].deltas} >= {"bias"}
    ours = artifact_logits(plan, tmp_path / "out")
    assert difference(ours, logits(live(base, adapter))) < 1e-5
    without = Plan(plan.base, (strip_biases(plan.adapters[0]),))
    forgotten = artifact_logits(without, tmp_path / "forgotten")
    assert difference(ours, forgotten) > 1e-4  # negative control: the bias matters


def strip_biases(adapter):
    from dataclasses import replace

    kept = tuple(d for d in adapter.deltas if d.parameter != "bias")
    return replace(adapter, deltas=kept)


@pytest.mark.parametrize("kind", ["LOHA", "OFT", "IA3", "C3A", "RANDLORA"])
def test_one_perturbed_tensor_is_noticed(tmp_path, bases, kind):
    """Negative control: weights, one by one, against the probed live layers."""
    base = bases["llama"]
    adapter = save_tuned(base, tmp_path / "a", kind, **LINEAR[kind])
    model = live(base, adapter).get_base_model()
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(n for n in tensors if ".layers.2." in n and tensors[n].is_floating_point())[-1]
    assert worst(plan_of(base, adapter), model) < 1e-13
    tensors[name] = tensors[name].clone() * 1.01
    save_file(tensors, path, {"format": "pt"})
    assert worst(plan_of(base, adapter), model) > 1e-7


@pytest.mark.parametrize("kind", ["VERA", "LOKR", "RANDLORA", "UNILORA"])
def test_a_bf16_base_is_merged_as_its_float32_self(tmp_path, kind):
    """Frozen tensors are drawn in float32, as for the live model, whatever the base stores."""
    base = save_base("llama", tmp_path / "base", dtype=torch.bfloat16)
    options = dict(save_projection=False) if kind == "VERA" else {}
    adapter = save_tuned(base, tmp_path / "a", kind, **{**LINEAR[kind], **options})
    assert worst(plan_of(base, adapter), live(base, adapter).get_base_model()) < 1e-13


def worst(plan, model):
    found = 0.0
    with tuned.layers_freed():
        for name, change in plan.changes().items():
            exact = live_parameter(model, name)[0].numpy()
            error = abs(merged(change, "F64") - exact).max() / abs(exact).max()
            found = max(found, float(error))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
@pytest.mark.parametrize(
    ("model", "kind"), [("llama", "OFT"), ("llama", "TRAINABLE_TOKENS"), ("gpt2", "IA3")]
)
def test_whole_builds_are_proved(tmp_path, bases, model, kind, target):
    adapter = save_tuned(bases[model], tmp_path / "a", kind, **options_of(kind, model))
    outcome = build(
        Recipe(
            base=str(bases[model]), adapters=[str(adapter)], target=target, out=tmp_path / "out",
            parity={"level": "fast"},
        )
    )  # fmt: skip
    assert outcome.report is not None and outcome.report["passed"]


def test_the_skeleton_holds_no_weight(tmp_path, bases):
    base = bases["llama"]
    adapter = save_tuned(base, tmp_path / "a", "LOHA", modules_to_save=["lm_head"], r=4)
    term = plan_of(base, adapter).adapters[0].deltas[0].terms[0]
    skeleton = Skeleton.build(term)
    assert len(skeleton.layers) == 16
    for layer in skeleton.layers.values():
        assert layer.get_base_layer().weight.untyped_storage().nbytes() == 4
    sizes = [t.untyped_storage().nbytes() for t in skeleton.model.state_dict().values()]
    assert sum(sizes) < 1.2 * adapter.joinpath("adapter_model.safetensors").stat().st_size
    given = term.base.tensors[f"{term.path}.weight"].read().astype("float64")
    first = skeleton.merge(term.path, {"weight": given})["weight"]
    again = skeleton.merge(term.path, {"weight": given})["weight"]
    assert (first == again).all() and not (first == given).all()
    assert skeleton.layers[term.path].get_base_layer().weight.untyped_storage().nbytes() == 4
    assert skeleton.layers[term.path].hada_w1_a["default"].dtype == torch.float32


def test_every_tuner_of_peft_has_a_row_or_a_reason():
    known = {*TUNERS, *REPLACING_ROWS, *REFUSED, *PROMPTS, "LORA", "BONE"}
    assert {t.value for t in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING} <= known
    assert {*LINEAR, *REPLACING, "BEFT"} == {*TUNERS, *REPLACING_ROWS}


@pytest.mark.parametrize("kind", [*sorted(REFUSED), "NEWEST"])
def test_the_others_are_refused_by_name(tmp_path, bases, kind):
    save_file({"prompt_embeddings": torch.zeros(2, 64)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedError, match=kind) as caught:
        plan_of(bases["llama"], tmp_path)
    assert caught.value.remedy


def test_what_does_not_fit_is_named(tmp_path, bases):
    base = bases["llama"]
    wide = save_base("llama", tmp_path / "wide", hidden_size=32)
    other = save_tuned(wide, tmp_path / "other", "HRA", r=4)
    with pytest.raises(AdapterError, match=r"hra_u with \d+ columns, expected"):
        plan_of(base, other)
    with pytest.raises(UnsupportedError, match="no bias in the base, and BEFT adds one"):
        plan_of(base, save_tuned(base, tmp_path / "beft", "BEFT"))
    adapter = save_tuned(base, tmp_path / "a", "LOHA", r=4)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if n.endswith("hada_w1_a"))
    spoiled = {
        n.replace("hada_w1_a", "hada_w1_z") if n == name else n: t for n, t in tensors.items()
    }
    save_file(spoiled, path, {"format": "pt"})
    with pytest.raises(AdapterError, match="hada_w1_z: a tensor that belongs to no site"):
        plan_of(base, adapter)
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(AdapterError, match="a tensor that the file lacks and PEFT would invent"):
        artifact_logits(plan_of(base, adapter), tmp_path / "out")
    save_file({n: t for n, t in tensors.items() if ".2." not in n}, path, {"format": "pt"})
    with pytest.raises(
        AdapterError, match="a module that the config targets and the file lacks|PEFT would invent"
    ):
        artifact_logits(plan_of(base, adapter), tmp_path / "out2")


def test_two_adapters_of_which_one_is_no_lora_are_no_plain_sum(tmp_path, bases):
    base = open_base(str(bases["llama"]))
    folder = save_tuned(bases["llama"], tmp_path / "a", "IA3", **LINEAR["IA3"])
    one, two = (open_adapter(str(folder), base, name) for name in ("one", "two"))
    plan = verify(Plan(base, (one, two)))
    with pytest.raises(UnsupportedError, match="IA3 beside another adapter.*method linear adds"):
        Compose()(plan)
    verify(Compose("linear")(plan))
