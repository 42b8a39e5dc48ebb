"""`fold`: each target layer gets the sum of the deltas of the layers nearest to it."""

from __future__ import annotations

from collections.abc import Sequence

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.passes.redistribute.moved import Terms, as_term, beside, factors, truncated


def fold(terms: Terms, targets: Sequence[int], rank: int, dtype: str = "F32") -> Terms:
    """Sums, module by module, each the best approximation of `rank`; no data is needed.

    A layer belongs to the target nearest to it, the lower one of two. Raises UnsupportedError for
    a module that has not one shape in all layers.
    """
    segments: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for layer, module in sorted(terms):
        nearest = min(targets, key=lambda target: (abs(target - layer), target))
        segments.setdefault((nearest, module), []).append((layer, module))
    folded: Terms = {}
    for place, members in segments.items():
        if members == [place]:
            folded[place] = terms[place]  # alone in its segment: as it is
            continue
        pairs = [factors(terms[member]) for member in members]
        shapes = {(a.shape[1], b.shape[0]) for a, b in pairs}
        if len(shapes) > 1:
            raise UnsupportedError(
                f"fold: {place[1]}", f"shapes {sorted(shapes)} in different layers", "one shape",
                "use the strategy fit",
            )  # fmt: skip
        folded[place] = (as_term(place, truncated(beside(pairs), rank), dtype),)
    return folded
