"""How an adapter's deltas are moved onto a few layers; one row a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptrix_export.passes.redistribute.moved import Moved
from adaptrix_export.passes.redistribute.strategies.fold import fold
from adaptrix_export.passes.redistribute.strategies.select import select

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.strategy_input import StrategyInput


def _select(given: StrategyInput) -> Moved:
    return Moved(select(given.terms, given.targets))


def _fold(given: StrategyInput) -> Moved:
    return Moved(fold(given.terms, given.targets, given.rank, given.dtype))


def _fit(given: StrategyInput) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.fit import fit  # PyTorch

    return fit(given)


def _distill(given: StrategyInput) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.distill import distill  # PyTorch

    return distill(given)


STRATEGIES: dict[str, Callable[[StrategyInput], Moved]] = {
    "select": _select,
    "fold": _fold,
    "fit": _fit,
    "distill": _distill,
}
