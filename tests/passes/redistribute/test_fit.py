"""The closed form, against what it must equal; which modules write; what a bad fit becomes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from adaptrix_export.measure.calibration import Calibration
from adaptrix_export.oracle.layered import Live
from adaptrix_export.oracle.writes import find_writes
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.redistribute.moved import factors
from adaptrix_export.passes.redistribute.redistribute import Redistribute, split_terms
from adaptrix_export.passes.redistribute.strategies import fit as fitting
from adaptrix_export.passes.redistribute.strategies.fit import LAMBDAS, Sums, solve
from adaptrix_export.progress import Silent
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.tiny import auto_of, config_of, save_adapter

MODULES = {
    "llama": ["mlp.down_proj", "self_attn.o_proj"],  # the nearest to the layer's output first
    "gpt2": ["mlp.c_proj", "attn.c_proj"],
    "bert": ["attention.output.dense", "output.dense"],  # behind norms: as the data flows
    "qwen3": ["mlp.down_proj", "self_attn.o_proj"],
}


def rows(count, inputs=12, outputs=7, seed=0):
    """X and R, R a linear map of X that is nearly of rank 3, and noise."""
    rng = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    x = torch.randn(count, inputs, generator=rng)
    left = torch.randn(inputs, 3, generator=fixed)
    right = torch.randn(3, outputs, generator=fixed)
    return x, x @ left @ right + 0.1 * torch.randn(count, outputs, generator=rng)


def sums(x, r):
    found = Sums.empty(x.shape[1], r.shape[1], "cpu")
    for start in range(0, len(x), 50):
        found.add(x[start : start + 50], r[start : start + 50])
    return found


def ridge(x, r, penalty):
    """In fp64, by the normal equations: (in, out)."""
    x, r = x.double(), r.double()
    gram = x.T @ x
    size = penalty * gram.diagonal().mean()  # the mean of the eigenvalues
    return torch.linalg.solve(gram + size * torch.eye(len(gram), dtype=torch.float64), x.T @ r)


def test_at_full_rank_it_is_ridge_regression():
    seen, unseen = rows(400), rows(100, seed=1)
    a, b, penalty = solve(sums(*seen), sums(*unseen), 7)
    assert penalty in LAMBDAS
    assert torch.allclose((b @ a).T, ridge(*seen, penalty), atol=1e-5)


def test_at_a_lower_rank_it_is_the_best_of_that_rank():
    """Reduced-rank ridge is ordinary least squares on rows that the penalty adds: no pair found by
    descent from it, or from elsewhere, has a smaller penalised error."""
    seen, unseen = rows(400), rows(100, seed=1)
    a, b, penalty = solve(sums(*seen), sums(*unseen), 2)
    x, r = (v.double() for v in seen)
    size = penalty * (x.T @ x).diagonal().mean()
    x = torch.cat([x, size.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    r = torch.cat([r, torch.zeros(x.shape[1], r.shape[1], dtype=torch.float64)])
    found = float((r - x @ (b @ a).T).square().sum())
    full = x @ torch.linalg.lstsq(x, r).solution
    vt = torch.linalg.svd(full, full_matrices=False).Vh
    best = float((r - full @ vt[:2].T @ vt[:2]).square().sum())
    assert found == pytest.approx(best, rel=1e-6)
    assert torch.linalg.matrix_rank(b @ a) == 2


def test_lambda_is_the_one_that_unseen_tokens_like_best():
    seen, unseen = rows(14), rows(300, seed=1)
    _, _, penalty = solve(sums(*seen), sums(*unseen), 7)
    x, r = (v.double() for v in unseen)
    errors = {p: float((r - x @ ridge(*seen, p)).square().sum()) for p in LAMBDAS}
    assert penalty == min(errors, key=errors.get)


def test_sums_give_the_error_of_any_pair():
    x, r = rows(200)
    a, b = torch.randn(2, 12).double(), torch.randn(7, 2).double()
    wanted = float((r.double() - x.double() @ a.T @ b.T).square().sum())
    assert sums(x, r).error(a, b) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", list(MODULES))
def test_which_modules_write_to_the_residual(kind):
    torch.manual_seed(0)
    model = auto_of(kind).from_config(config_of(kind)).eval()
    places = {"gpt2": "transformer.h", "bert": "encoder.layer"}
    live = Live(
        get_peft_model(model, LoraConfig(target_modules="all-linear")),
        places.get(kind, "model.layers"),
        "feature-extraction" if kind == "bert" else "text-generation",
    )
    hidden = live.enter(torch.randint(0, 256, (2, 9)))
    matrices = frozenset(
        name.removesuffix(".base_layer") for name, module in live.layers[1].named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and "lora_" not in name
    )  # fmt: skip
    assert [w.module for w in find_writes(live, 1, hidden, matrices)] == MODULES[kind]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    base = save_base_with_tokenizer("llama", folder / "base", num_hidden_layers=4)
    return plan_of(base, save_adapter(base, folder / "adapter"))


def fitted(plan, **options):
    with pass_context(Silent()) as context:
        text = Calibration("self", 256, 32)
        out = Redistribute(layers=(1, 2), calibration=text, context=context, **options)(plan)
        name = out.adapters[0].name
        terms = {(d.site.layer, d.site.module): factors(d.terms) for d in out.adapters[0].deltas}
        return out.measured["fidelity"][name], terms


def test_every_position_of_every_row_is_counted_the_first_among_them(plan, monkeypatch):
    """Without position 0, the attention sink, a fit once made a model collapse."""
    counted = []
    add = Sums.add
    monkeypatch.setattr(Sums, "add", lambda self, x, r: (counted.append(len(x)), add(self, x, r)))
    told, _ = fitted(plan)
    writes = sum(len(target["modules"]) for target in told["targets"])
    assert sum(counted) == writes * told["calibration"]["tokens"] == writes * 256


@pytest.mark.parametrize(("times", "note"), [(6.0, r"shrunk to 0\.(5|25)"), (-1.0, "dropped")])
def test_a_fit_that_makes_the_error_larger_is_shrunk_or_dropped_and_told(
    plan, monkeypatch, times, note
):
    good, _ = fitted(plan)
    assert not good["notes"] and [t["used"] for t in good["targets"]] == [1.0, 1.0]
    assert all(t["error_after"] < t["error_before"] for t in good["targets"])
    calls = []

    def spoilt(seen, unseen, rank):
        """Each layer's first fit far too large or the wrong way round, its second none."""
        calls.append(rank)
        a, b, penalty = solve(seen, unseen, rank)
        return a, (times if len(calls) % 2 else 0.0) * b, penalty

    monkeypatch.setattr(fitting, "solve", spoilt)
    told, terms = fitted(plan)
    match = f"layer 1: the fit made the error larger on unseen tokens: {note}"
    assert any(re.fullmatch(match, n) for n in told["notes"]), told["notes"]
    assert all(t["error_after"] <= t["error_before"] for t in told["targets"])
    if times < 0:  # what is left is the adapter's own
        _, own, _ = split_terms(plan, plan.adapters[0])
        assert set(terms) == {place for place in own if place[0] in (1, 2)}
        for place, (a, b) in terms.items():
            x, y = factors(own[place])
            assert np.allclose(b @ a, y @ x, atol=1e-6)
