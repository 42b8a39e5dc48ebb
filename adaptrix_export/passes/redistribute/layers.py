"""Which layers a redistributed adapter is moved to.

`auto` is n/4, n/2, 3n/4 of n layers, where the original system injects; a number spreads that many
evenly over the depth, the first and the last layer left out; a list is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe.layers import AUTO, Layers, check_layers


def choose_layers(layers: Layers, count: int) -> tuple[int, ...]:
    """The layers that `layers` means in a stack of `count`, ascending; not for `search`.

    Raises RecipeError for layers that the stack does not have.
    """
    check_layers(layers)
    if layers == AUTO:
        return tuple(sorted({count // 4, count // 2, 3 * count // 4}))
    if isinstance(layers, int):
        return evenly_spread(layers, count)
    assert isinstance(layers, tuple)
    unknown = [layer for layer in layers if not 0 <= layer < count]
    if unknown:
        raise RecipeError(
            "layers", f"layer {unknown[0]}", f"0 to {count - 1}", f"the base has {count} layers"
        )
    return tuple(sorted(layers))


def evenly_spread(budget: int, count: int) -> tuple[int, ...]:
    """floor(i n / (k + 1)), i = 1..k: 5 of 30 are 5, 10, 15, 20, 25. All n of n is all of them;
    otherwise layer 0 is never one of them, nor the last unless only one is left out."""
    if budget > count:
        raise RecipeError(
            "layers", f"{budget} of {count}", f"at most {count}", f"the base has {count} layers"
        )
    if budget == count:
        return tuple(range(count))
    return tuple(i * count // (budget + 1) for i in range(1, budget + 1))


def best_layers(growth: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """The `wanted` layers with the least error left over the whole depth, for `search`.

    `growth[s][l]` is the error after layer l when layer s - 1 was the last to be corrected (s = 0:
    none was): what the adapter has added to the residual since then. Minimises the sum over all
    layers by dynamic programming over (last target, targets left).
    """
    count = len(growth) - 1
    if budget >= count:
        return tuple(range(count))
    # tail[s][k]: the least sum from layer s on, with s corrected up to and k targets to place
    tail: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(count + 1)]
    for start in range(count, -1, -1):
        row: list[tuple[float, tuple[int, ...]]] = [(float(sum(growth[start][start:])), ())]
        for k in range(1, budget + 1):
            options: list[tuple[float, tuple[int, ...]]] = []
            for target in range(start, count):
                rest = tail[target + 1]
                if k - 1 < len(rest):
                    cost, after = rest[k - 1]
                    options.append((sum(growth[start][start:target]) + cost, (target, *after)))
            if not options:
                break
            row.append(min(options))
        tail[start] = row
    return tail[0][budget][1]
