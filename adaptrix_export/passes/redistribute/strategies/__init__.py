"""How an adapter's deltas are moved onto a few layers; one row a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptrix_export.passes.redistribute.moved import Moved
from adaptrix_export.passes.redistribute.strategies.fold import fold
from adaptrix_export.passes.redistribute.strategies.select import select

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.strategy_input import StrategyInput


def _select(problem: StrategyInput) -> Moved:
    return Moved(select(problem.terms, problem.targets))


def _fold(problem: StrategyInput) -> Moved:
    return Moved(fold(problem.terms, problem.targets, problem.rank, problem.dtype))


def _fit(problem: StrategyInput) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.fit import fit  # PyTorch

    return fit(problem)


def _distill(problem: StrategyInput) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.distill import distill  # PyTorch

    return distill(problem)


STRATEGIES: dict[str, Callable[[StrategyInput], Moved]] = {
    "select": _select,
    "fold": _fold,
    "fit": _fit,
    "distill": _distill,
}
