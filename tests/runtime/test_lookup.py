"""Prompt lookup: guesses from the text, and the tokens of greedy decoding in fewer steps."""

from __future__ import annotations

import numpy as np
import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.lookup import Lookup
from adaptrix_export.runtime.running import Run
from adaptrix_export.runtime.sampling import Sampling
from adaptrix_export.runtime.session import Session
from tests.artifacts import packaged

ROW = [5, 6, 7, 8, 9, 40, 5, 6, 7]


def test_a_guess_is_what_followed_the_last_tokens_before():
    text = Lookup([1, 2, 3, 4, 5, 9, 2, 3])
    assert text.guess(3) == [4, 5, 9] and text.guess(1) == [4] and text.guess(0) == []
    text.extend([7, 2, 3])
    assert text.guess(2) == [7, 2]  # the latest place of a pair
    text.extend([4])
    assert text.guess(2) == [5, 9]  # of three tokens, before that of two
    assert Lookup([1, 2, 3]).guess(4) == [] and Lookup([1]).guess(4) == []


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(packaged("llama", tmp_path_factory.mktemp("lookup"))[0].folder)


@pytest.fixture
def steps(monkeypatch):
    """How many tokens each step was fed."""
    sizes, step = [], Run.step

    def counted(self, ids, mask):
        sizes.append(ids.shape[1])
        return step(self, ids, mask)

    monkeypatch.setattr(Run, "step", counted)
    return sizes


@pytest.mark.parametrize("count", [1, 2, 63, 64, 400])
def test_the_tokens_are_those_of_greedy_decoding_in_fewer_steps(session, steps, count):
    free = session.generate_ids(ROW, count, stop_at_eos=False)
    alone = len(steps)
    assert session.generate_ids(
        ROW, count, stop_at_eos=False, sampling=Sampling(lookup=5)
    ) == free  # fmt: skip
    assert max(steps[alone + 1 :], default=0) <= 6
    if count > 2:
        assert len(steps) - alone < 0.8 * alone


def test_guesses_that_are_all_wrong_change_nothing(session, steps, monkeypatch):
    """Control of the cache: what a wrong guess left in it is written over."""
    free = session.generate_ids(ROW, 40, stop_at_eos=False)
    alone = len(steps)
    draw, unsaid = np.random.default_rng(0), sorted(set(range(3, 290)) - set(free))
    monkeypatch.setattr(Lookup, "guess", lambda self, most: draw.choice(unsaid, size=most).tolist())
    found = session.generate_ids(ROW, 40, stop_at_eos=False, sampling=Sampling(lookup=7))
    assert found == free
    assert len(steps) - alone == alone and steps[alone + 1] == 8  # one token a step all the same


def test_an_end_among_the_guesses_ends_the_answer(session):
    free = session.generate_ids(ROW, 40, stop_at_eos=False)
    stop = {free[20]}
    expected = session.generate_ids(ROW, 40, stop_at_eos=False, stop=stop)
    found = session.generate_ids(
        ROW, 40, stop_at_eos=False, stop=stop, sampling=Sampling(lookup=6)
    )  # fmt: skip
    assert found == expected and found[-1] == free[20]


def test_what_lookup_is_not_for_is_refused(session, monkeypatch):
    for odd in ({"temperature": 0.5}, {"repetition_penalty": 1.2}):
        with pytest.raises(SourceError, match="lookup: 4, expected 0, or a temperature of 0"):
            Sampling(lookup=4, **odd)
    with pytest.raises(SourceError, match="lookup: 2 prompts, expected one prompt"):
        session.generate_batch([ROW, ROW], 3, sampling=Sampling(lookup=4))
    monkeypatch.setattr(session._graph, "shares_cache", False)
    with pytest.raises(SourceError, match="lookup: a cache of another kind"):
        session.generate_ids(ROW, 3, sampling=Sampling(lookup=4))
