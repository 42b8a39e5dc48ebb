"""`layers: search`: the target layers with the least left to lose, from one look at the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adaptrix_export.errors import RecipeError
from adaptrix_export.oracle.layered import ADAPTED
from adaptrix_export.passes.redistribute.layers import best_layers, evenly_spread

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.strategy_input import StrategyInput

ROWS = 8  # of calibration text: differences between layers are far larger than between rows


def search(problem: StrategyInput, max_sites: int | None, max_bytes: int | None) -> tuple[int, ...]:
    """As many layers as the budget allows, at the places where correcting pays most.

    Sites and bytes are counted as `select` would have them at the rank of the problem, which
    is the most that any strategy writes. Raises RecipeError for a budget of less than one layer.
    """
    count = len(problem.live.layers)
    a_layer = max(sum(1 for layer, _ in problem.terms if layer == n) for n in range(count))
    budget = count
    if max_sites is not None:
        budget = min(budget, max_sites // a_layer)
    if max_bytes is not None:
        budget = min(budget, max_bytes // _layer_bytes(problem))
    if budget < 1:
        raise RecipeError(
            "layers: search", f"{max_sites or max_bytes} as the budget",
            f"at least {a_layer} sites, {_layer_bytes(problem)} bytes", "one layer takes that",
        )  # fmt: skip
    if budget >= count:
        return evenly_spread(count, count)
    return best_layers(growth(problem), budget)


def _layer_bytes(problem: StrategyInput) -> int:
    """Bytes of one target layer, each of its sites at the full rank, in fp32."""
    sizes: dict[str, int] = {}
    for (_, module), site_terms in problem.terms.items():
        sizes[module] = site_terms[0].a.shape[1] + site_terms[0].b.shape[0]
    return 4 * problem.rank * sum(sizes.values())


def growth(problem: StrategyInput) -> list[list[float]]:
    """[s][l]: what the adapter has added to the residual after layer l since layer s - 1.

    The mean over tokens of |D_l - D_(s-1)|^2 / |h_l|^2, D the difference of adapted and base
    residual and h the adapted one; D_(-1) is 0.
    """
    live, count = problem.live, len(problem.live.layers)
    table = [[0.0] * count for _ in range(count + 1)]
    rows = problem.rows.fit[:ROWS]
    for row in rows:
        ids = torch.from_numpy(row[None]).to(live.device)
        _, bare = live.base_answer(ids)
        hidden, moved, size = live.enter(ids), [torch.zeros_like(bare[0])], []
        for number in range(count):
            with torch.no_grad():
                hidden = live.layer(ADAPTED, number, hidden)
            moved.append(hidden - bare[number])
            size.append(hidden.square().sum(-1))
        for start in range(count + 1):
            for number in range(start, count):
                off = (moved[number + 1] - moved[start]).square().sum(-1) / size[number]
                table[start][number] += float(off.mean()) / len(rows)
    return table
