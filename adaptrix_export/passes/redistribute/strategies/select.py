"""`select`: the deltas that the adapter has at the target layers, and no others."""

from __future__ import annotations

from collections.abc import Sequence

from adaptrix_export.passes.redistribute.moved import Terms


def select(terms: Terms, targets: Sequence[int]) -> Terms:
    """The terms of the target layers, as they are. It is what the original system did."""
    return {place: site_terms for place, site_terms in terms.items() if place[0] in targets}
