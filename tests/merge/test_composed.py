"""Every method of composition against dense float64 numpy, written from the papers; and algebra."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.merge.composed import low_rank_factors
from adaptrix_export.merge.merge import merged
from adaptrix_export.oracle.composed import Share, compose
from adaptrix_export.plan import (
    Array,
    Change,
    Composed,
    Dora,
    Experts,
    LowRank,
    Part,
    Scaled,
    Site,
)
from adaptrix_export.plan.composition import Composition
from adaptrix_export.plan.methods import METHODS
from tests.merge.test_algebra import Held

NAME = "model.layers.0.q.weight"
SITE = Site("model.layers", 0, "q")
DENSE = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
ALL = tuple(m for m in METHODS if m not in ("cat", "peft-cat", "peft-svd"))


@dataclass(frozen=True)
class Case:
    weight: Array  # (out, in)
    parts: tuple[Part, ...]

    def change(self, method: str, turned: bool = False, **options) -> Change:
        settings = {"density": 0.4, "rank": 2, "seed": 3, **options}
        term = Composed(method, NAME, self.parts, **settings)
        stored = self.weight.T.copy() if turned else self.weight
        return Change(NAME, SITE, Held(stored), turned, (term,))

    def delta(self, method: str, turned: bool = False, **options) -> Array:
        change = self.change(method, turned, **options)
        zero = Held(np.zeros_like(change.source.read()))  # the delta itself, without a rounding
        only = Change(NAME, SITE, zero, turned, change.terms)
        found = merged(only, "F64")
        return found.T if turned else found

    @property
    def deltas(self) -> list[Array]:
        """w_i, D_i as dense products; for low-rank parts alone."""
        return [sum(t.scale * t.b.read() @ t.a.read() for t in part.terms) for part in self.parts]

    @property
    def weights(self) -> list[float]:
        return [part.weight for part in self.parts]


def case(seed=0, out=9, inputs=7, ranks=(2, 3), weights=(1.0, 1.0)) -> Case:
    random = np.random.default_rng(seed)
    parts = tuple(
        Part(
            f"a{i}",
            (
                LowRank(
                    Held(random.normal(size=(r, inputs))), Held(random.normal(size=(out, r))), 0.5
                ),
            ),
            w,
        )
        for i, (r, w) in enumerate(zip(ranks, weights, strict=True))
    )
    return Case(random.normal(size=(out, inputs)), parts)


# -- the papers' formulas, dense, with no code of the package


def top(x: Array, density: float) -> Array:
    order = np.argsort(-np.abs(x), axis=None)[: max(1, int(density * x.size))]
    kept = np.zeros(x.size)
    kept[order] = x.reshape(-1)[order]
    return kept.reshape(x.shape)


def mask(adapter: str, name: str, shape, density: float, seed: int) -> Array:
    key = int.from_bytes(sha256(f"{seed}\n{adapter}\n{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(shape) < density


def disjoint_mean(values: list[Array]) -> Array:
    stack = np.stack(values)
    sign = np.sign(stack.sum(axis=0))
    agree = np.sign(stack) == sign
    return (stack * agree).sum(axis=0) / np.maximum((agree & (stack != 0)).sum(axis=0), 1)


def best(x: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]


def formula(c: Case, method: str, density=0.4, rank=2, seed=3, turned=False) -> Array:
    deltas, weights = c.deltas, c.weights
    names = [part.adapter for part in c.parts]

    def dropped() -> list[Array]:
        masks = [mask(n, NAME, d.T.shape if turned else d.shape, density, seed)
                 for n, d in zip(names, deltas, strict=True)]  # fmt: skip
        masks = [m.T if turned else m for m in masks]
        return [w * d * m / density for w, d, m in zip(weights, deltas, masks, strict=True)]

    def trimmed() -> list[Array]:
        return [w * top(d, density) for w, d in zip(weights, deltas, strict=True)]

    dense = {
        "linear": lambda: sum(w * d for w, d in zip(weights, deltas, strict=True)),
        "magnitude_prune": lambda: sum(trimmed()),
        "ties": lambda: disjoint_mean(trimmed()),
        "dare_linear": lambda: sum(dropped()),
        "dare_ties": lambda: disjoint_mean(dropped()),
    }
    if method in dense:
        return dense[method]()
    if method.removesuffix("_svd") in dense or method == "svd":
        return best(dense["linear" if method == "svd" else method.removesuffix("_svd")](), rank)
    if method == "knots":
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        count = sum(part.terms[0].rank for part in c.parts)
        right = np.split(vt[:count], len(deltas), axis=1)
        return (u[:, :count] * s[:count]) @ disjoint_mean(
            [w * top(v, density) for w, v in zip(weights, right, strict=True)]
        )
    assert method == "tsv"
    found = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    each = max(1, rank // len(deltas))
    u = np.concatenate([f[0][:, :each] for f in found], axis=1)
    v = np.concatenate([f[2][:each].T for f in found], axis=1)
    s = np.concatenate([w * f[1][:each] for w, f in zip(weights, found, strict=True)])

    def polar(x: Array) -> Array:  # x (x^T x)^-1/2
        values, vectors = np.linalg.eigh(x.T @ x)
        return x @ vectors @ np.diag(values**-0.5) @ vectors.T

    return polar(u) @ np.diag(s) @ polar(v).T


def close(found: Array, expected: Array, tolerance=1e-11) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max()))


OURS = tuple(m for m in ALL if not m.startswith("peft-"))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_a_method_is_its_formula_on_dense_deltas(method, weights, turned):
    c = case(weights=weights)
    found = c.delta(method, turned)
    assert close(found, formula(c, method, turned=turned))
    if method != "linear":
        assert not close(found, formula(c, "linear"), 1e-3)  # negative control


@pytest.mark.parametrize("method", OURS)
def test_three_adapters_and_a_density_of_one(method):
    c = case(ranks=(1, 2, 2), weights=(1.0, 0.5, 2.0))
    assert close(c.delta(method, density=1.0, rank=3), formula(c, method, 1.0, 3))


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_oracle_computes_the_same_by_its_own_code(method, turned):
    """The oracle, in PyTorch, against the lowering; with another draw it would not agree."""
    c = case(weights=(0.7, 1.3))

    def oracle(seed: int) -> Array:
        options = Composition(method, (), 0.4, 2, "total", seed).as_dict()
        shares = [
            Share(p.adapter, p.weight, torch.from_numpy(d),
                  [(torch.from_numpy(t.b.read()), torch.from_numpy(t.a.read()), t.scale)
                   for t in p.terms])
            for p, d in zip(c.parts, c.deltas, strict=True)
        ]  # fmt: skip
        return compose(shares, options, NAME, turned, True).delta.numpy()

    found = c.delta(method, turned)
    assert close(found, oracle(3))
    assert ("dare" in method) == (not close(found, oracle(4), 1e-6))


PEFT = {
    "peft-linear": lambda t, w: merge_utils.task_arithmetic(t, w),
    "peft-magnitude-prune": lambda t, w: merge_utils.magnitude_prune(t, w, 0.4),
    "peft-ties": lambda t, w: merge_utils.ties(t, w, 0.4),
    "peft-dare-linear": lambda t, w: merge_utils.dare_linear(t, w, 0.4),
    "peft-dare-ties": lambda t, w: merge_utils.dare_ties(t, w, 0.4),
}


@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("turned", [False, True])
def test_peft_formulas_are_pefts_own_functions_on_the_factors(method, turned, monkeypatch):
    """dare with our draw in the place of torch.bernoulli, in the order in which PEFT draws."""
    c = case(ranks=(3, 3), weights=(0.7, -1.2))
    draws = iter(
        mask(p.adapter, f"{NAME}.lora_{x}", getattr(p.terms[0], x.lower()).shape, 0.4, 3)
        for x in "AB"
        for p in c.parts
    )
    monkeypatch.setattr(torch, "bernoulli", lambda _: torch.from_numpy(next(draws)).double())
    made = []
    for which in ("a", "b"):
        tensors = [torch.from_numpy(getattr(p.terms[0], which).read()) for p in c.parts]
        strengths = [p.weight * p.terms[0].scale for p in c.parts]
        sign = [-1.0 if x < 0 and which == "a" else 1.0 for x in strengths]
        weights = [g * abs(x) ** 0.5 for g, x in zip(sign, strengths, strict=True)]
        made.append(PEFT[method](tensors, torch.tensor(weights, dtype=torch.float64)).numpy())
    found = c.delta(method, turned)
    assert close(found, made[1] @ made[0])
    assert not close(found, formula(c, "linear"), 1e-3)  # cross terms: not the sum of deltas


def test_frequency_elects_by_number_and_by_the_sum_where_numbers_are_even():
    values = [np.array([[3.0, 3.0]]), np.array([[-1.0, -1.0]]), np.array([[-1.0, 0.0]])]
    parts = tuple(
        Part(f"a{i}", (LowRank(Held(v), Held(np.ones((1, 1))), 1.0),)) for i, v in enumerate(values)
    )
    c = Case(np.zeros((1, 2)), parts)
    assert c.delta("ties", density=1.0, election="frequency").tolist() == [[-1.0, 3.0]]
    assert c.delta("ties", density=1.0).tolist() == [[3.0, 3.0]]


def test_what_cancels_elects_nothing_and_equal_magnitudes_stay_together():
    a = Held(np.array([[1.0, -1.0, 0.5, 0.25]]))
    one = Part("x", (LowRank(a, Held(np.ones((1, 1))), 0.3),))
    minus = Part("y", (LowRank(a, Held(-np.ones((1, 1))), 0.3),))
    assert not Case(np.zeros((1, 4)), (one, minus)).delta("ties", density=1.0).any()
    pruned = Case(np.zeros((1, 4)), (one, one)).delta("magnitude_prune", density=0.25)
    assert np.allclose(pruned, [[0.6, -0.6, 0, 0]])


def dora_parts(weight: Array, seed=0) -> tuple[tuple[Part, Part], list[Array]]:
    """A DoRA and a LoRA beside it, and their dense deltas, each alone on the base."""
    random = np.random.default_rng(seed)
    out, inputs = weight.shape
    a, b = random.normal(size=(2, inputs)), random.normal(size=(out, 2))
    magnitude = random.uniform(0.5, 2, size=out)
    v = weight + 0.5 * b @ a
    dora = (magnitude / np.linalg.norm(v, axis=1))[:, None] * v - weight
    c, d = random.normal(size=(3, inputs)), random.normal(size=(out, 3))
    parts = (
        Part("dora", (Dora(Held(a), Held(b), 0.5, Held(magnitude)),), 0.7),
        Part("lora", (LowRank(Held(c), Held(d), 0.5),), 1.1),
    )
    return parts, [dora, 0.5 * d @ c]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method", [m for m in OURS if m not in ("knots", "tsv")])
def test_dora_is_the_delta_of_its_live_layer(method, turned):
    weight = np.random.default_rng(5).normal(size=(9, 7))
    parts, deltas = dora_parts(weight)
    c = Case(weight, parts)
    found = merged(c.change(method, turned), "F64")
    found = (found.T if turned else found) - weight

    class Dense(Case):
        @property
        def deltas(self) -> list[Array]:
            return deltas

    assert close(found, formula(Dense(weight, parts), method, turned=turned), 1e-10)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "svd", "knots", "tsv"])
def test_stacked_experts_are_composed_one_by_one(method):
    random = np.random.default_rng(1)
    count, out, inputs, r = 3, 6, 5, 2
    pairs = [
        (random.normal(size=(count * r, inputs)), random.normal(size=(out, r * count)))
        for _ in range(2)
    ]
    parts = tuple(
        Part(f"a{i}", (Experts(Held(a), Held(b), 0.5, count),)) for i, (a, b) in enumerate(pairs)
    )
    term = Composed(method, NAME, parts, 0.4, 2, "total", 3)
    change = Change(NAME, SITE, Held(np.zeros((count, out, inputs))), False, (term,))
    found = merged(change, "F64")
    for e in range(count):
        own = tuple(
            Part(f"a{i}", (LowRank(Held(a[e * r : e * r + r]), Held(b[:, e::count]), 0.5),))
            for i, (a, b) in enumerate(pairs)
        )
        expert = Composed(method, f"{NAME}[{e}]", own, 0.4, 2, "total", 3)
        one = Change(NAME, SITE, Held(np.zeros((out, inputs))), False, (expert,))
        assert close(found[e], merged(one, "F64"))
        assert np.array_equal(merged(change, "F64", e, e + 1)[0], found[e])


def test_a_bias_is_a_vector():
    vectors = [np.array([1.0, -2.0, 3.0]), np.array([-4.0, -5.0, 0.5])]
    parts = tuple(Part(f"a{i}", (Scaled(Held(v), 0.5),)) for i, v in enumerate(vectors))
    term = Composed("ties", "m.bias", parts, 1.0)
    change = Change("m.bias", SITE, Held(np.zeros(3)), False, (term,))
    assert np.allclose(merged(change, "F64"), [-2.0, -1.75, 0.875])


# -- properties

seeds = st.integers(0, 2**32)
weights_of_two = st.tuples(st.floats(0.1, 3), st.floats(-3, -0.1))


@given(seed=seeds, weights=weights_of_two, method=st.sampled_from(OURS))
@settings(max_examples=60, deadline=None)
def test_the_order_of_adapters_does_not_matter(seed, weights, method):
    c = case(seed, weights=weights)
    assert close(c.delta(method), Case(c.weight, c.parts[::-1]).delta(method), 1e-7)


@given(seed=seeds, factor=st.floats(-3, 3), method=st.sampled_from(OURS))
@settings(max_examples=60, deadline=None)
def test_weights_scale_the_result(seed, factor, method):
    """Every method is homogeneous in its weights."""
    c = case(seed, weights=(1.0, 0.5))
    scaled = Case(c.weight, tuple(Part(p.adapter, p.terms, factor * p.weight) for p in c.parts))
    assert close(scaled.delta(method), factor * c.delta(method), 1e-7)


@given(seed=seeds, scale=st.floats(0.1, 3))
@settings(max_examples=30, deadline=None)
def test_how_a_delta_is_factored_does_not_matter_but_to_peft(seed, scale):
    c = case(seed, ranks=(2, 2))

    def refactored(part: Part) -> Part:
        (term,) = part.terms
        turn = np.array([[scale, 1.0], [0.0, 1.0]])
        a = Held(np.linalg.solve(turn, term.a.read()))
        return Part(part.adapter, (LowRank(a, Held(term.b.read() @ turn), term.scale),))

    other = Case(c.weight, tuple(refactored(part) for part in c.parts))
    for method in OURS:
        assert close(other.delta(method), c.delta(method), 1e-6), method


def test_draws_depend_on_seed_adapter_and_name_alone():
    c = case()
    again = c.delta("dare_linear")
    assert np.array_equal(again, c.delta("dare_linear"))
    assert not close(again, c.delta("dare_linear", seed=4), 1e-3)
    renamed = Case(c.weight, (Part("other", c.parts[0].terms), c.parts[1]))
    assert not close(again, renamed.delta("dare_linear"), 1e-3)


def test_dare_is_unbiased_over_seeds():
    c = case()
    mean = np.mean([c.delta("dare_linear", seed=s, density=0.5) for s in range(3000)], axis=0)
    spread = np.abs(mean - formula(c, "linear")) / np.abs(np.stack(c.deltas)).max()
    assert spread.max() < 0.08


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method", [m for m in ALL if METHODS[m].low_rank])
def test_low_rank_results_have_exact_factors(method, turned):
    c = case(ranks=(2, 2))
    b, a = low_rank_factors(c.change(method, turned))
    assert b.shape[0] == 9 and a.shape[1] == 7
    assert close(b @ a, c.delta(method, turned))
    if METHODS[method].truncates:
        assert b.shape[1] == a.shape[0] <= 2


def test_dense_results_have_no_factors_and_say_what_has():
    c = case()
    with pytest.raises(UnsupportedError, match="_svd"):
        low_rank_factors(c.change("ties"))
    plain = Change(NAME, SITE, Held(c.weight), False, tuple(t for p in c.parts for t in p.terms))
    b, a = low_rank_factors(plain)
    assert b.shape[1] == 5 and close(b @ a, sum(c.deltas))
