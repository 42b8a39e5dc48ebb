"""How an adapter's deltas are moved onto a few layers; one row a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptrix_export.passes.redistribute.moved import Moved
from adaptrix_export.passes.redistribute.strategies.fold import fold
from adaptrix_export.passes.redistribute.strategies.select import select

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.work import Work


def _select(work: Work) -> Moved:
    return Moved(select(work.terms, work.targets))


def _fold(work: Work) -> Moved:
    return Moved(fold(work.terms, work.targets, work.rank, work.dtype))


def _fit(work: Work) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.fit import fit  # PyTorch

    return fit(work)


def _distill(work: Work) -> Moved:
    from adaptrix_export.passes.redistribute.strategies.distill import distill  # PyTorch

    return distill(work)


STRATEGIES: dict[str, Callable[[Work], Moved]] = {
    "select": _select,
    "fold": _fold,
    "fit": _fit,
    "distill": _distill,
}
