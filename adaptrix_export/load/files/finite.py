"""NaN and infinity in an adapter, detected before anything is merged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adaptrix_export.errors import AdapterError
from adaptrix_export.plan import Adapter, Array, Plan, Tensor
from adaptrix_export.progress import Progress

BLOCK = 1 << 20  # values in memory at a time


def check_finite(plan: Plan, progress: Progress) -> None:
    """Raise AdapterError for the first value in the adapters that is not a finite number."""
    with progress.stage("adapter values"):
        for adapter in plan.adapters:
            for error in not_finite(adapter):
                raise error


def not_finite(adapter: Adapter) -> Iterator[AdapterError]:
    """One error for every tensor of the adapter that holds NaN or infinity."""
    for place, tensor in shipped_tensors(adapter):
        nan = infinite = 0
        for values in blocks(tensor):
            nan += int(np.count_nonzero(np.isnan(values)))
            infinite += int(np.count_nonzero(np.isinf(values)))
        if nan or infinite:
            problem = f"{nan} NaN and {infinite} infinite values in {tensor.name}"
            yield AdapterError(
                f"{adapter.name}: {place}", problem,
                "finite numbers", "training went wrong; use an earlier checkpoint",
            )  # fmt: skip


def shipped_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(module path, tensor) for every tensor that the adapter ships, each tensor once."""
    visited: set[Tensor] = set()
    for delta in adapter.deltas:
        for term in delta.terms:
            for tensor in term.tensors:
                if tensor not in visited:
                    visited.add(tensor)
                    yield delta.site.path, tensor
    for saved in adapter.replacements:
        yield saved.site.path, saved.tensor


def blocks(tensor: Tensor) -> Iterator[Array]:
    """The values, some rows at a time, in a dtype that numpy computes with."""
    if not tensor.shape:
        yield tensor.read()
        return
    width = int(np.prod(tensor.shape[1:], dtype=np.int64)) or 1
    step = max(1, BLOCK // width)
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(tensor.shape[0], start + step))
