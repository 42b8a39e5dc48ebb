"""Whether the whole model is asked beyond its smallest threshold, as its replica always is."""

from __future__ import annotations

from math import prod

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.oracle.thresholds import Threshold, thresholds
from adaptrix_export.plan import Base

AUTO, ON, OFF = "auto", "on", "off"
# Multiplications that `auto` spends on it: two minutes or so on two cores, both models together.
BUDGET = 2e12
_PASSES = 10  # over the threshold's tokens: five cases, in both models


def long_crossings(base: Base, long: str) -> tuple[Threshold, ...]:
    """The smallest threshold of the model, if `long` ("auto", "on" or "off") has it crossed."""
    smallest = thresholds(base.config)[:1] if base.task == GENERATION else ()
    if long == OFF or not smallest:
        return ()
    operations = (
        2 * sum(prod(tensor.shape) for tensor in base.tensors.values()) * smallest[0].at * _PASSES
    )
    return smallest if long == ON or operations <= BUDGET else ()
