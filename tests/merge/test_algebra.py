"""The algebra of deltas against dense fp64: sums in any order, scales, ranks side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptrix_export.merge.merge import merged
from adaptrix_export.plan import Array, Change, LowRank, Site

SITE = Site("layers", 0, "q")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in memory, for tests alone."""

    values: Array
    name: str = "x"
    dtype: str = "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> Array:
        return self.values

    def rows(self, start: int, stop: int) -> Array:
        return self.values[start:stop]


@st.composite
def sums(draw):
    """A weight (out, in) and one to four low-rank terms for it."""
    out, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    terms = []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, 5))
        scale = draw(st.floats(-4, 4))
        a, b = random.normal(size=(rank, inputs)), random.normal(size=(out, rank))
        terms.append(LowRank(Held(a), Held(b), scale))
    return random.normal(size=(out, inputs)), tuple(terms)


def total(weight: Array, terms: tuple[LowRank, ...], transposed: bool = False) -> Array:
    stored = weight.T.copy() if transposed else weight
    found = merged(Change("w", SITE, Held(stored), transposed, terms), "F64")
    return found.T if transposed else found


def dense(weight: Array, terms: tuple[LowRank, ...]) -> Array:
    return weight + sum(t.scale * t.b.read() @ t.a.read() for t in terms)


def close(left: Array, right: Array) -> bool:
    return bool(np.allclose(left, right, rtol=1e-12, atol=1e-12))


@given(sums(), st.booleans())
def test_a_sum_is_the_dense_sum_however_it_is_stored(given_sum, transposed):
    weight, terms = given_sum
    assert close(total(weight, terms, transposed), dense(weight, terms))


@given(sums(), st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_matter(given_sum, random):
    weight, terms = given_sum
    shuffled = list(terms)
    random.shuffle(shuffled)
    cut = random.randint(0, len(terms))
    grouped = total(total(weight, tuple(shuffled[:cut])), tuple(shuffled[cut:]))
    assert close(grouped, total(weight, terms))


@given(sums(), st.floats(-3, 3))
def test_scales_multiply(given_sum, factor):
    weight, terms = given_sum
    scaled = tuple(LowRank(t.a, t.b, factor * t.scale) for t in terms)
    zero = np.zeros_like(weight)
    assert close(total(zero, scaled), factor * total(zero, terms))


@given(sums())
def test_ranks_side_by_side_are_one_term(given_sum):
    """[s1 b1, s2 b2, ...] @ [a1; a2; ...] is the sum: what composition by `cat` rests on."""
    weight, terms = given_sum
    a = np.concatenate([t.a.read() for t in terms])
    b = np.concatenate([t.scale * t.b.read() for t in terms], axis=1)
    one = LowRank(Held(a), Held(b), 1.0)
    assert one.rank == sum(t.rank for t in terms)
    assert close(total(weight, (one,)), total(weight, terms))
