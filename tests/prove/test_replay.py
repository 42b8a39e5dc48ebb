"""One rounding is told from two, in every format, without a model."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import Affine, Slice, TensorRef, Transpose
from adaptrix_export.prove.floats import FORMATS, format_of
from adaptrix_export.prove.replay import coarsest, replay
from adaptrix_export.targets.stored import StoredTensors

NAMES = sorted(FORMATS)
Replay = tuple[dict[str, Any], set[str]]


def replayed(artifact: np.ndarray, expected: np.ndarray, changed: bool, **options: Any) -> Replay:
    stored = StoredTensors({"w": lambda: artifact})
    weights = options.pop("weights", {"w": TensorRef("site.weight")})
    return replay(stored, weights, lambda name: (expected, changed), **options)


def true_half_ulp(value: float, bits: int, min_exponent: int) -> Fraction:
    """By search in exact arithmetic: the binade below |value|, no smaller than the subnormals'."""
    exponent, size = min_exponent, abs(Fraction(value))
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - bits)


@given(
    value=st.floats(-3e4, 3e4) | st.floats(-1e-7, 1e-7) | st.just(1.0), name=st.sampled_from(NAMES)
)
def test_half_an_ulp_is_exact_subnormals_included(value: float, name: str) -> None:
    kind = FORMATS[name]
    found = kind.half_ulp(np.array([value]))[0]
    assert Fraction(float(found)) == true_half_ulp(value, kind.bits, kind.min_exponent)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changed", [True, False])
def test_the_nearest_value_passes_and_its_neighbour_does_not(name: str, changed: bool) -> None:
    kind = FORMATS[name]
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(40, 7)).astype(np.float32).astype(np.float64)
    right = exact.astype(np.float32).astype(kind.dtype)
    report, formats = replayed(right, exact, changed)
    assert report["passed"] and formats == {name} and report["changed"] == changed
    wrong = right.copy()
    wrong[3, 3] = np.nextafter(wrong[3, 3], np.array(9, kind.dtype))
    report, _ = replayed(wrong, exact, changed)
    assert report["failures"][0]["why"].startswith("1 of 280 values")
    assert report["failures"][0]["sites"] == ["site"]


@pytest.mark.parametrize("name", NAMES)
def test_values_that_no_adapter_changed_may_come_in_their_own_format(name: str) -> None:
    """The same report from fp32 values as from a copy in fp64, an expression that computes too."""
    kind = FORMATS[name]
    exact = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
    right, wrong = exact.astype(kind.dtype), exact.astype(kind.dtype)
    wrong[3, 3] = np.nextafter(wrong[3, 3], np.array(9, kind.dtype))
    for stored, passes in ((right, True), (wrong, False)):
        report = replayed(stored, exact, False)
        assert report == replayed(stored, exact.astype(np.float64), False)
        assert report[0]["passed"] == passes
    computed = {"w": Affine(1.1, 0.3, TensorRef("site.weight"))}
    once = (exact.astype(np.float64) * 1.1 + 0.3).astype(np.float32)
    assert replayed(once, exact, False, weights=computed)[0]["passed"]
    several = exact * np.float32(1.1) + np.float32(0.3)  # rounded at each step
    assert not replayed(several, exact, False, weights=computed)[0]["passed"]


def test_rounding_through_fp32_to_bf16_is_found_out() -> None:
    # a hair above the tie of two bf16 numbers, so near that fp32 rounds it onto the tie
    exact = np.array([1 + 2.0**-8 + 2.0**-40])
    twice = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    once = np.array([1 + 2.0**-7]).astype(ml_dtypes.bfloat16)
    assert not replayed(twice, exact, True)[0]["passed"]
    assert replayed(once, exact, True)[0]["passed"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("changed", [True, False])
def test_what_is_not_finite_fails(bad: float, changed: bool) -> None:
    exact = np.ones(5)
    found = np.ones(5, np.float32)
    found[2] = bad
    report, _ = replayed(found, exact, changed)
    assert report["failed"] == 1
    assert report["worst"]["ulps"] is None


def test_untouched_ties_go_to_even_as_every_converter_rounds_them() -> None:
    tie = np.array([1 + 2.0**-11])  # halfway between two fp16 numbers
    even, odd = np.array([1.0], np.float16), np.array([1 + 2.0**-10], np.float16)
    assert replayed(even, tie, False)[0]["passed"]
    assert not replayed(odd, tie, False)[0]["passed"]


@pytest.mark.parametrize(
    ("found", "options", "why"),
    [
        (np.ones((2, 2), np.float32), {}, "shape (2, 2), expected (4,)"),
        (np.ones(4, np.int8), {}, "stored as int8"),
        (np.ones(4, np.float16), {"precision": "fp32"}, "stored as float16, expected fp32"),
        (np.ones(4, np.float32), {"weights": {"v": TensorRef("s.weight")}}, "missing"),
    ],
)
def test_what_cannot_be_compared_is_a_failure(
    found: np.ndarray, options: dict[str, Any], why: str
) -> None:
    report, _ = replayed(found, np.ones(4), True, **options)
    assert report["failures"][0]["why"].startswith(why)


def test_tensors_that_no_expression_covers_are_listed() -> None:
    stored = StoredTensors(
        {
            "w": lambda: np.ones(2, np.float32),
            "rotary": lambda: np.ones(8, np.float32),
            "shape": lambda: np.ones(8, np.int64),
        }
    )
    weights = {"w": TensorRef("site.weight")}
    report, _ = replay(stored, weights, lambda name: (np.ones(2), False))
    assert report["unmapped"] == ["rotary"]


def test_expressions_are_evaluated_over_the_live_weights_once_a_tensor() -> None:
    live = np.arange(12.0).reshape(3, 4)
    reads: list[str] = []

    def read(name: str) -> tuple[np.ndarray, bool]:
        reads.append(name)
        return live, True

    weights = {
        f"{axis}": Transpose((1, 0), Slice(1, 2 * axis, 2 * axis + 2, TensorRef("m.weight")))
        for axis in (0, 1)
    } | {"shifted": Affine(1.0, 1.0, TensorRef("n.weight"))}
    made: dict[str, Callable[[], np.ndarray]] = {
        "0": lambda: live[:, :2].T.astype(np.float32),
        "1": lambda: live[:, 2:].T.astype(np.float32),
        "shifted": lambda: (live + 1).astype(np.float32),
    }
    report, _ = replay(StoredTensors(made), weights, read)
    assert report["passed"] and report["elements"] == 24
    assert reads == ["m.weight", "n.weight"]


def test_formats_by_dtype() -> None:
    assert [format_of(np.dtype(d)) for d in (np.int64, np.float64)] == [None, None]
    assert coarsest({"fp32", "bf16"}) == "bf16"
    with pytest.raises(ParityError, match="no float tensor"):
        coarsest(set())
