"""The pass: identity, weights by layer, what each site gets, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import AdapterError, RecipeError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.plan import Composed, LowRank, Plan
from adaptrix_export.plan.composition import Composition, Weight
from adaptrix_export.plan.methods import METHODS
from tests.tiny import save_adapter, save_base
from tests.tuned import LINEAR, save_tuned

KINDS = {
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 3}),
    "dora": dict(use_dora=True),
    "bias": dict(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "saved": dict(modules_to_save=["lm_head"]),
}
TUNERS = ("IA3", "OFT", "HRA", "LOKR", "ROAD", "C3A")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return folder, {
        "plain": save_base("llama", folder / "plain", num_hidden_layers=2),
        "bias": save_base("llama", folder / "bias", num_hidden_layers=2, attention_bias=True),
    }


@pytest.fixture(scope="module")
def adapters(bases):
    """(base folder, adapter folder) of every kind, and a plain LoRA `other` for each base."""
    folder, found = bases
    made = {}
    for kind, options in KINDS.items():
        base = found["bias" if kind == "bias" else "plain"]
        made[kind] = (base, save_adapter(base, folder / kind, **options))
    for kind in TUNERS:
        made[kind] = (
            found["plain"],
            save_tuned(found["plain"], folder / kind, kind, **LINEAR[kind]),
        )
    for name, base in found.items():
        made[f"other {name}"] = (base, save_adapter(base, folder / f"other-{name}", seed=2, r=3))
    return made


def plan_of(*pairs) -> Plan:
    base = open_base(str(pairs[0][0]))
    names = "abc"
    found = [open_adapter(str(p[1]), base, n) for p, n in zip(pairs, names, strict=False)]
    return verify(Plan(base, tuple(found)))


def weights(**given: float) -> tuple[tuple[str, Weight], ...]:
    return tuple((name, Weight(value)) for name, value in given.items())


def values(plan: Plan) -> dict[str, np.ndarray]:
    with layers_freed():
        return {name: merged(change, "F64") for name, change in plan.changes().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS, *TUNERS])
def test_one_adapter_at_weight_one_is_the_identity(adapters, kind, method):
    plan = plan_of(adapters[kind])
    assert Compose(method)(plan) is plan
    assert Compose(method, weights(a=1.0))(plan) is plan


@pytest.mark.parametrize("kind", [*KINDS, *TUNERS])
def test_beside_an_adapter_of_weight_zero_nothing_changes_either(adapters, kind):
    """Every method that does not cut a rank, through the whole of composition and lowering."""
    base = "bias" if kind == "bias" else "plain"
    alone = values(plan_of(adapters[kind]))
    for method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots", "tsv"):
        plan = verify(
            Compose(method, weights(b=0.0))(plan_of(adapters[kind], adapters[f"other {base}"]))
        )
        found = values(plan)
        assert {n for n in found if n in alone} == set(alone)
        for name, value in alone.items():
            assert np.allclose(found[name], value, rtol=0, atol=1e-14), (method, name)


@pytest.mark.parametrize("kind", ["rslora", "dora", "IA3", "OFT"])
def test_weights_of_one_adapter_scale_its_delta(adapters, kind):
    plan = plan_of(adapters[kind])
    alone, scaled = values(plan), values(verify(Compose("ties", weights(a=0.25))(plan)))
    for name, change in plan.changes().items():
        base = change.source.read().astype(np.float64)
        assert np.allclose(scaled[name] - base, 0.25 * (alone[name] - base), atol=1e-13)


def test_cat_and_linear_are_the_same_sum_and_stay_low_rank(adapters):
    pairs = adapters["rslora"], adapters["other plain"]
    given = weights(a=0.5, b=-1.5)
    cat = verify(Compose("cat", given)(plan_of(*pairs)))
    linear = verify(Compose("linear", given)(plan_of(*pairs)))
    peft = verify(Compose("peft-cat", given)(plan_of(*pairs)))
    assert all(isinstance(t, LowRank) for d in linear.adapters[0].deltas for t in d.terms)
    singles = [plan_of(pair) for pair in pairs]
    for name, value in values(cat).items():
        assert np.array_equal(value, values(linear)[name])
        assert np.array_equal(value, values(peft)[name])
        base = cat.base.tensors[name].read().astype(np.float64)
        parts = [w * (values(p)[name] - base) for w, p in zip((0.5, -1.5), singles, strict=True)]
        assert np.allclose(value, base + sum(parts), atol=1e-13)


def test_weights_by_layer(adapters):
    given = (("a", Weight(1.0, ((0, 0.5), (1, 0.0)))),)
    plan = verify(Compose("cat", given)(plan_of(adapters["rslora"], adapters["other plain"])))
    counts = {d.site.layer: len(d.terms) for d in plan.adapters[0].deltas}
    assert counts == {0: 2, 1: 1}
    whole = verify(Compose()(plan_of(adapters["rslora"], adapters["other plain"])))
    for delta, before in zip(plan.adapters[0].deltas, whole.adapters[0].deltas, strict=True):
        if delta.site.layer == 0:
            assert delta.terms[0].scale == 0.5 * before.terms[0].scale
    assert plan.history == ("Compose(method='cat', weights={a: {0: 0.5, 1: 0.0, else 1.0}})",)


def test_a_site_of_one_adapter_is_kept_whole_but_for_the_rank(bases, adapters):
    folder, found = bases
    small = (
        found["plain"],
        save_adapter(found["plain"], folder / "small", r=6, target_modules=["up_proj"], seed=4),
    )
    pairs = plan_of(adapters["rslora"], small)
    ties = verify(Compose("ties")(pairs)).adapters[0].deltas
    kinds = {d.site.module: type(d.terms[0]).__name__ for d in ties}
    assert kinds["mlp.up_proj"] == "Composed" and kinds["mlp.down_proj"] == "LowRank"
    svd = verify(Compose("svd", rank=3)(pairs)).adapters[0].deltas
    assert all(isinstance(d.terms[0], Composed) and d.terms[0].rank == 3 for d in svd)
    largest = verify(Compose("svd")(pairs)).adapters[0].deltas
    assert {d.terms[0].rank for d in largest} == {4, 6}  # 4 fits into 6 as it is


PEFT = ["cat", "linear", "svd", "ties", "magnitude_prune"]


def peft_against_ours(base, pairs, method):
    """(largest difference, PEFT's delta / ours) over all sites: `add_weighted_adapter`, float32."""
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.3}
    compose = Compose(f"peft-{method.replace('_', '-')}", weights(a=0.7, b=-0.4), **options)
    plan = verify(compose(plan_of(*pairs)))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), pairs[0][1], "a"
    )
    model.load_adapter(pairs[1][1], "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "ab", combination_type=method, **options)
    worst, ratios = 0.0, []
    for name, value in values(plan).items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        expected = layer.get_delta_weight("ab").numpy()
        delta = value - plan.base.tensors[name].read()
        worst = max(worst, np.abs(delta - expected).max())
        ratios.append(np.linalg.norm(expected) / np.linalg.norm(delta))
    assert len(ratios) == 14
    return worst, ratios


@pytest.mark.parametrize("method", PEFT)
def test_peft_numbers(bases, adapters, method):
    folder, found = bases
    base = found["plain"]
    pairs = [(base, save_adapter(base, folder / f"p-{method}-{s}", seed=s)) for s in (7, 8)]
    worst, _ = peft_against_ours(base, pairs, method)
    assert worst < 2e-7
    # negative control, and a defect of PEFT's: the new adapter inherits use_rslora of the first,
    # whose scale of 1 becomes sqrt(rank)
    worst, ratios = peft_against_ours(base, [adapters["rslora"], pairs[1]], method)
    assert worst > 1e-3
    assert np.allclose(ratios, np.sqrt(8 if method == "cat" else 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "method", "options", "error", "match"),
    [
        (("rslora", "dora"), "peft-linear", {}, UnsupportedError, "more than LoRA.*use linear"),
        (("rslora", "other plain"), "peft-ties", {}, UnsupportedError, "ranks 3, 4"),
        (("IA3", "OFT"), "svd", {}, UnsupportedError, "set compose.rank"),
        (("saved", "rslora"), "ties", dict(weights=weights(a=0.5)), UnsupportedError,
         "lm_head.weight: shipped whole, with weight 0.5"),
        (("rslora", "dora"), "ties", dict(weights=weights(c=0.5)), AdapterError, "no such adapter"),
        (("rslora", "dora"), "cat", dict(weights=(("a", Weight(1.0, ((2, 0.5),))),)), AdapterError,
         "layer 2, expected 0 to 1"),
        (("rslora",), "svd", dict(rank=2), RecipeError, "given with one adapter"),
    ],
)  # fmt: skip
def test_refused_by_name(adapters, kinds, method, options, error, match):
    plan = plan_of(*(adapters[kind] for kind in kinds))
    with pytest.raises(error, match=match):
        Compose(method, **options)(plan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(method="tie"), "one of cat, linear"),
        (dict(method="linear", density=0.5), "given with method linear"),
        (dict(method="ties", rank=2), "one of svd"),
        (dict(method="ties", density=0.0), "above 0"),
        (dict(method="cat", seed=1), "given with method cat"),
    ],
)
def test_options_without_a_meaning_are_refused(options, match):
    with pytest.raises(RecipeError, match=match):
        Compose(**options)


def test_a_saved_head_of_one_adapter_stays_with_weight_one(adapters):
    plan = verify(Compose("ties")(plan_of(adapters["saved"], adapters["rslora"])))
    assert [r.name for r in plan.adapters[0].replacements] == ["lm_head.weight"]


def test_a_composition_comes_back_from_its_document():
    made = Composition("dare_ties", (("a", Weight(0.5, ((3, 1.5),))),), 0.2, None, "frequency", 9)
    assert Composition.from_dict(made.as_dict()) == made
    assert "seed=9" in repr(made) and "election='frequency'" in repr(made)
