"""Which adapter a request runs with: one by name, a weighted mix, one a row, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError, did_you_mean
from adaptrix_export.runtime.adapters import NOTHING, AdapterStore, Factors
from adaptrix_export.runtime.graph import DecoderGraph, Ids
from adaptrix_export.runtime.requests import number, shown, text
from adaptrix_export.runtime.statistics import BASE

# A name, a mix {name: weight}, a name or None for each row of a batch, or None: the base alone.
Selection = str | Mapping[str, float] | Sequence[str | None] | None


@dataclass(frozen=True)
class Choice:
    """A selection, resolved: `factors` gives what to bind, as soon as it is ready; `ids` are the
    adapters of each row (-1: none).

    One id stands for every row. `label` is what statistics call it.
    """

    label: str = BASE
    factors: Callable[[], Factors] = lambda: NOTHING
    ids: tuple[int, ...] = (-1,)

    def row_ids(self, batch: int) -> Ids:
        """(batch,) adapter numbers. Raises SourceError for another number of rows."""
        if len(self.ids) not in (1, batch):
            raise SourceError("adapters", f"{len(self.ids)} of them", f"one for each of {batch}")
        return np.broadcast_to(np.array(self.ids, dtype=np.int64), (batch,)).copy()


def resolved(selection: Selection, graph: DecoderGraph, store: AdapterStore) -> Choice:
    """The choice, or SourceError for a name or a kind of selection that this graph has not."""
    if selection is None or (isinstance(selection, Mapping) and not selection):
        return Choice()
    _check_kind(selection)
    if graph.takes_ids:
        return _by_row(selection, graph)
    if isinstance(selection, str):
        return Choice(selection, store.factors({selection: 1.0}))
    if isinstance(selection, Mapping):
        label = "+".join(f"{weight:g}*{name}" for name, weight in sorted(selection.items()))
        only = len(selection) == 1 and next(iter(selection.values())) == 1
        return Choice(next(iter(selection)) if only else label, store.factors(selection))
    raise SourceError(
        "adapters", "one for each row", "one for the whole request",
        "build with `rows: true` for an adapter a row",
    )  # fmt: skip


def _check_kind(selection: Any) -> None:
    """Raise SourceError for what is no name, no mix of names and no name for each row."""
    if isinstance(selection, str):
        return
    if isinstance(selection, Mapping):
        for name, weight in selection.items():
            text("name of an adapter", name)
            number(f"weight of adapter {name}", weight)
    elif isinstance(selection, Sequence) and not isinstance(selection, bytes):
        for name in selection:
            if name is not None:
                text("name of an adapter", name)
    else:
        raise SourceError("adapter", shown(selection), "a name, {name: weight}, or None")


def _by_row(selection: Selection, graph: DecoderGraph) -> Choice:
    if isinstance(selection, Mapping):
        if len(selection) != 1 or next(iter(selection.values())) != 1:
            raise SourceError(
                "adapters", "a weighted mix", "a name for each row",
                "build without `rows: true` for mixes",
            )  # fmt: skip
        selection = next(iter(selection))
    names = [selection] if isinstance(selection, str) else list(selection or ())
    for name in names:
        if name is not None and name not in graph.rows:
            raise SourceError(
                f"adapter {name!r}", "not in this graph", ", ".join(graph.rows),
                did_you_mean(name, graph.rows),
            )  # fmt: skip
    ids = tuple(-1 if name is None else graph.rows.index(name) for name in names)
    label = "|".join(dict.fromkeys(BASE if name is None else name for name in names))
    return Choice(label, ids=ids)
