"""The pass that puts gates into a plan, and what `verify` says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptrix_export.errors import AdapterError, InputError, RecipeError, UnsupportedError
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.merge.merge import merged
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.pipeline import build
from adaptrix_export.plan import Gate, Plan, Site
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.targets import TARGETS
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base
from tests.tools.zoo import house
from tests.tools.zoo_rows import ANIMALS


def planned(tmp_path: Path, kind: str = "llama", **options: Any) -> Plan:
    base = save_base(kind, tmp_path / "base", tie_word_embeddings=False)
    return verify(plan_of(base, save_adapter(base, tmp_path / "adapter", **options)))


def test_every_site_gets_its_gate(tmp_path: Path) -> None:
    plan = WireContext(tau=0.25, stats=True)(planned(tmp_path))
    assert [g.site for g in plan.gates] == list(plan.sites()) and len(plan.gates) == 28
    assert {(g.mode, g.tau) for g in plan.gates} == {("clamp", 0.25)} and plan.gate_stats
    assert "WireContext(mode='clamp', tau=0.25" in plan.history[-1]
    assert verify(plan).merged().changes() == {}


def test_named_layers_are_gated_and_the_others_merge(tmp_path: Path) -> None:
    plan = WireContext(tau=((1, 0.1), (3, 0.2)))(planned(tmp_path))
    assert {(s.layer, g.tau) for s, g in plan.gated().items()} == {(1, 0.1), (3, 0.2)}
    layers = {change.site.layer for change in plan.merged().changes().values()}
    assert layers == {0, 2}


def test_a_layer_without_an_adapter_is_named(tmp_path: Path) -> None:
    plan = planned(tmp_path, target_modules=["q_proj"], layers_to_transform=[1, 2])
    with pytest.raises(AdapterError, match="layer 3: no site.*layers 1, 2"):
        WireContext(tau=((1, 0.1), (3, 0.2)))(plan)


def test_blend_is_a_scaled_delta(tmp_path: Path) -> None:
    plain = planned(tmp_path)
    plan = verify(WireContext(mode="blend", weight=0.25)(plain))
    assert plan.gated() == {} and plan.merged() is plan
    for name, change in plan.changes().items():
        base = change.source.read().astype(np.float64)
        whole = merged(plain.changes()[name], "F64")
        np.testing.assert_allclose(
            merged(change, "F64"), base + 0.25 * (whole - base), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(use_dora=True), "Dora"),
        (dict(target_modules=["q_proj", "lm_head"]), "replaces whole"),
        (dict(target_modules=["q_proj"], modules_to_save=["k_proj"]), None),
    ],
)
def test_what_cannot_be_gated_is_refused_or_merged(
    options: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    plan = planned(tmp_path, **options)
    if why is None:  # what is replaced whole has no delta: only the others are gated
        assert {s.module for s in WireContext(tau=1.0)(plan).gated()} == {"self_attn.q_proj"}
        return
    with pytest.raises(UnsupportedError, match=why):
        WireContext(tau=1.0)(plan)
    dropping = WireContext(tau=1.0, on_mismatch="drop")
    if why == "Dora":
        with pytest.raises(AdapterError, match="no site that can be gated"):
            dropping(plan)
        return
    kept = dropping(plan)
    assert len(kept.gates) == 4 and [a.kind for a in kept.adjustments] == ["ungated"]
    assert kept.adjustments[0].place == "lm_head"


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        (dict(tau=0.0), "tau 0.0"),
        (dict(tau=float("nan")), "tau nan"),
        (dict(tau=None), "tau None"),
        (dict(mode="blend", tau=None), "weight None"),
        (dict(mode="squash"), "squash"),
        (dict(site=Site("model.layers", 0, "self_attn.x_proj")), "no adapter changes it"),
        (dict(site=Site("", None, "model.norm")), "no adapter changes it"),
        (dict(site=Site("model.layers", 9, "self_attn.q_proj")), "no adapter changes it"),
    ],
)
def test_verify_checks_gates(gate: dict[str, Any], why: str, tmp_path: Path) -> None:
    plan = planned(tmp_path)
    good = Gate(Site("model.layers", 0, "self_attn.q_proj"), "clamp", tau=0.5)
    verify(replace(plan, gates=(good,)))
    with pytest.raises(InputError, match=why):
        verify(replace(plan, gates=(replace(good, **gate),)))
    with pytest.raises(AdapterError, match="two gates"):
        verify(replace(plan, gates=(good, good)))


@pytest.mark.parametrize("target", ["safetensors", "peft"])
@pytest.mark.parametrize("mode", [{"tau": 0.5}, {"mode": "mask"}])
def test_weights_alone_cannot_hold_gates(target: str, mode: dict[str, Any], tmp_path: Path) -> None:
    plan = verify(WireContext(**mode)(planned(tmp_path)))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match="target onnx, or mode blend"):
        TARGETS[target].lower(plan, tmp_path / "out", Silent())
    assert not list((tmp_path / "out").iterdir())


def test_a_blend_is_the_scale_of_a_peft_folder(tmp_path: Path) -> None:
    """Read again, it is the adapter times the weight, where a weight was given."""
    plain = planned(tmp_path, lora_bias=False, rank_pattern={"q_proj": 2})
    plan = verify(WireContext(mode="blend", weight=((1, 0.25), (2, -0.5), (3, 0.0)))(plain))
    (tmp_path / "out").mkdir()
    TARGETS["peft"].lower(plan, tmp_path / "out", Silent())
    again = plan_of(tmp_path / "base", tmp_path / "out")
    found, wanted = again.changes(), plan.changes()
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(
            merged(found[name], "F64"), merged(wanted[name], "F64"), rtol=0, atol=1e-12
        )


def test_a_blend_of_dora_is_no_peft_adapter(tmp_path: Path) -> None:
    plan = verify(WireContext(mode="blend", weight=0.5)(planned(tmp_path, use_dora=True)))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match="Dora term times 0.5.*onnx or safetensors"):
        TARGETS["peft"].lower(plan, tmp_path / "out", Silent())


def test_an_encoder_decoder_can_be_blended_only(tmp_path: Path) -> None:
    housed = house(next(animal for animal in ANIMALS if animal.kind == "t5"), tmp_path)
    plan = verify(plan_of(housed.base, housed.adapter))
    with pytest.raises(UnsupportedError, match="clamp gate in an encoder-decoder.*mode blend"):
        WireContext(tau=0.5)(plan)
    assert verify(WireContext(mode="blend", weight=0.5)(plan)).gated() == {}


def test_infinities_are_refused_before_they_reach_a_gate(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    name = next(key for key in factors if key.endswith("layers.2.mlp.up_proj.lora_B.weight"))
    factors[name][3, 1] = np.inf
    save_file(factors, file, {"format": "pt"})
    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="onnx", out=tmp_path / "out",
        context={"tau": 0.5},
    )  # fmt: skip
    with pytest.raises(AdapterError, match="layers.2.mlp.up_proj: 0 NaN and 1 infinite"):
        build(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


FIELDS: dict[str, Any] = {"base": "./no-such", "adapters": ["./none"], "out": "out"}


@pytest.mark.parametrize("context", [{"tau": 0.5}, {"mode": "mask"}])
@pytest.mark.parametrize("target", ["safetensors", "peft"])
def test_the_refusal_comes_before_any_work(context: dict[str, Any], target: str) -> None:
    """The base is not even looked for."""
    with pytest.raises(RecipeError, match="target one of onnx, .*blend is merged exactly"):
        build(Recipe(**FIELDS, target=target, context=context))


@pytest.mark.parametrize(
    ("context", "why"),
    [
        ({}, "mode clamp without tau"),
        ({"mode": "blend"}, "mode blend without weight"),
        ({"mode": "mask", "tau": 0.5}, "tau with mode mask"),
        ({"tau": 0.5, "weight": 0.5}, "weight with mode clamp"),
        ({"tau": 0}, "tau"),
        ({"tau": {}}, "no layers"),
        ({"tau": 0.5, "share": 0.9}, "share without tau: calibrated"),
        ({"tau": "calibrated", "share": 1.5}, "share"),
        ({"mode": "blend", "weight": 0.5, "stats": True}, "stats with mode blend"),
        ({"mode": "blend", "weight": 0.5, "scope": "layer"}, "scope layer with mode blend"),
        ({"mode": "squash"}, "squash"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused(context: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        Recipe(**FIELDS, target="onnx", context=context)


@pytest.mark.parametrize(
    "context",
    [{"tau": 0.5}, {"tau": {7: 0.1, 15: 0.2}}, {"tau": "calibrated", "share": 0.99},
     {"mode": "mask", "stats": True}, {"mode": "blend", "weight": {"7": 0.5}}],
)  # fmt: skip
def test_a_context_that_does(context: dict[str, Any]) -> None:
    recipe = Recipe(**FIELDS, target="onnx", context=context)
    assert recipe.context is not None
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
