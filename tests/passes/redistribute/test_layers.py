"""Which layers a redistribution goes to."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from adaptrix_export.errors import RecipeError
from adaptrix_export.passes.redistribute.layers import best_layers, choose_layers
from adaptrix_export.recipe.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("auto", "auto"), ("5", 5), ("7,15,22", (7, 15, 22)), ("7,", (7,)), (" search ", "search")],
)
def test_what_a_flag_means(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "middle", "7,,8", "-1", "5.0", "1,x"])
def test_what_means_nothing_is_refused(text):
    with pytest.raises(RecipeError):
        parse_layers(text)


@pytest.mark.parametrize(
    ("layers", "count", "chosen"),
    [
        (5, 30, (5, 10, 15, 20, 25)),
        (3, 30, (7, 15, 22)),
        (8, 30, (3, 6, 10, 13, 16, 20, 23, 26)),
        ("auto", 30, (7, 15, 22)),
        ("auto", 12, (3, 6, 9)),
        ("auto", 1, (0,)),
        (1, 1, (0,)),
        (4, 4, (0, 1, 2, 3)),
        ((22, 7), 30, (7, 22)),
    ],
)
def test_layers_of_a_stack(layers, count, chosen):
    assert choose_layers(layers, count) == chosen


def test_a_spread_leaves_out_both_ends_wherever_it_can():
    for count in range(3, 40):
        for wanted in range(1, count - 1):
            spread = choose_layers(wanted, count)
            assert len(set(spread)) == wanted and min(spread) > 0 and max(spread) < count - 1


@pytest.mark.parametrize("layers", [0, 31, (30,), (-1,), (3, 3), (), "all"])
def test_layers_that_a_stack_of_thirty_lacks(layers):
    with pytest.raises(RecipeError):
        choose_layers(layers, 30)


def test_search_finds_what_trying_all_finds():
    """The dynamic programme against every choice, on random tables."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = 7
        table = rng.random((count + 1, count)).tolist()

        def left(targets, table=table, count=count):
            total, start = 0.0, 0
            for number in range(count):
                if number in targets:
                    start = number + 1
                else:
                    total += table[start][number]
            return total

        for wanted in (1, 2, 3):
            best = min(combinations(range(count), wanted), key=left)
            assert left(best_layers(table, wanted)) == pytest.approx(left(best))
