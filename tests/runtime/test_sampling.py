"""Choosing tokens: step by step as transformers does it, drawn with the frequencies it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.sampling import (
    Sampler,
    Sampling,
    nucleus,
    penalized,
    probabilities,
    strongest,
)

RANDOM = np.random.default_rng(3)
SCORES = [RANDOM.normal(scale=s, size=50) for s in (0.3, 2.0, 9.0)]


def theirs(processor, scores, seen=(0,)):
    made = processor(torch.tensor([list(seen)]), torch.tensor(scores)[None])
    return made[0].numpy()


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("count", [1, 7, 50, 400])
def test_top_k_is_that_of_transformers(scores, count):
    np.testing.assert_array_equal(strongest(scores, count), theirs(TopKLogitsWarper(count), scores))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_is_that_of_transformers(scores, share):
    np.testing.assert_array_equal(nucleus(scores, share), theirs(TopPLogitsWarper(share), scores))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 8.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    seen = [4, 4, 9, 31]
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), SCORES[1], seen)
    np.testing.assert_allclose(penalized(SCORES[1], set(seen), penalty), expected, rtol=1e-12)


def test_greedy_takes_the_largest_and_the_penalty_holds_for_it():
    scores = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert [Sampler(Sampling(), [1]).choose(scores) for _ in range(3)] == [1, 1, 1]
    choose = Sampler(Sampling(repetition_penalty=1.2), []).choose
    assert [choose(scores) for _ in range(3)] == [1, 2, 1]  # 3.0, then 2.9 > 2.5, then 2.5 > 2.42


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=2.0, top_k=3, seed=1), [])
    drawn = np.bincount([sampler.choose(scores) for _ in range(20_000)], minlength=4) / 20_000
    expected = np.sqrt([0.5, 0.3, 0.15, 0.0])
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.015)
    assert drawn[3] == 0 and probabilities(np.array([0.0, -np.inf]))[1] == 0


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
     {"repetition_penalty": 0.0}, {"seed": -2}, {"temperature": float("nan")}],
)  # fmt: skip
def test_values_out_of_range_are_named(options):
    with pytest.raises(SourceError, match=next(iter(options))):
        Sampling(**options)
