"""Rounding, and sums of low-rank terms in strips, against plain numpy and exact arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from adaptrix_export.merge import thin
from adaptrix_export.merge.ahead import ahead
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.merge.thin import Thin

BF16 = np.dtype(ml_dtypes.bfloat16)


def every_bf16():
    values = np.arange(1 << 16, dtype=np.uint16).view(BF16).astype(np.float64)
    return np.sort(values[np.isfinite(values)])


def nearest(low, high, value):
    """The one of two neighbours that `value` rounds to, with ties to the even one."""
    middle = (low + high) / 2
    even = np.where(low.astype(BF16).view(np.uint16) & 1 == 0, low, high)
    return np.where(value < middle, low, np.where(value > middle, high, even))


@pytest.mark.parametrize("share", [0.0, 2**-45, -(2**-45), 2**-20, -(2**-20), 0.4, -0.4])
def test_every_tie_of_bf16_and_what_lies_beside_it(share):
    """Values at and next to the middle between each two neighbours, subnormal ones included."""
    values = every_bf16()
    low, high = values[:-1], values[1:]
    between = (low + high) / 2 + share * (high - low)
    assert np.array_equal(to_dtype(between, "BF16").astype(np.float64), nearest(low, high, between))


def test_two_roundings_would_have_failed():
    values = every_bf16()
    low, high = values[:-1], values[1:]
    between = (low + high) / 2 + 2**-45 * (high - low)
    twice = between.astype(np.float32).astype(BF16).astype(np.float64)
    assert not np.array_equal(twice, nearest(low, high, between))


def test_a_transposed_array_is_rounded_in_its_own_order():
    values = np.random.default_rng(0).normal(size=(7, 5))
    values[2, 3] = 1.00390625 + 2**-40
    turned = to_dtype(values.T, "BF16")
    assert np.array_equal(turned, to_dtype(values, "BF16").T)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (37, 129), (70, 3, 3, 3)])
@pytest.mark.parametrize("strip", [1, 100, thin.STRIP])
def test_sums_in_strips(monkeypatch, dtype, shape, strip):
    monkeypatch.setattr(thin, "STRIP", strip)
    monkeypatch.setattr(thin, "SMALL", 100 * strip)  # so that columns are cut, too
    random = np.random.default_rng(0)
    rows, columns = shape[0] + 5, int(np.prod(shape[1:]))
    base = random.normal(size=shape).astype(BF16)
    terms = [(random.normal(size=(rows, r)), random.normal(size=(r, columns))) for r in (3, 2)]
    found = Thin(terms).added_to(base, 5, dtype)
    exact = base.astype(np.float64).reshape(shape[0], -1)
    exact = exact + sum(left[5:] @ right for left, right in terms)
    assert found.shape == shape
    ulps = np.abs(to_dtype(exact, dtype).astype(np.float64) - found.reshape(shape[0], -1))
    assert not ulps.any()


def test_results_come_in_order_and_errors_come_through():
    def fails():
        raise ValueError("of a task")

    assert list(ahead((lambda n=n: n * n) for n in range(50))) == [n * n for n in range(50)]
    with pytest.raises(ValueError, match="of a task"):
        list(ahead([lambda: 1, fails, lambda: 3]))
