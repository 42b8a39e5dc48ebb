"""Which layers a base has, which are its middle ones, and how much an adapter changes each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from adaptrix_export.merge.norms import change_norm
from adaptrix_export.plan import Base, Plan
from adaptrix_export.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LayerNorms = dict[tuple[str, int | None], float]


def layer_map(base: Base, plans: Sequence[Plan], progress: Progress) -> dict[str, Any]:
    """`{"stacks": [...], "outside": {adapter: norm}}`, every layer of every stack in order.

    The norm of a layer is the Frobenius norm of all that the one adapter of a plan changes in it:
    the square root of the sum over its tensors. `outside` is the same over what is in no layer.
    """
    sizes: Counter[tuple[str, int | None]] = Counter()
    for name, tensor in base.tensors.items():
        site = base.architecture.site_of(name.rpartition(".")[0])
        sizes[site.stack, site.layer] += prod(tensor.shape)
    norms = {plan.adapters[0].name: layer_norms(plan, progress) for plan in plans}
    stacks = []
    for i, stack in enumerate(base.architecture.stacks):
        middle = base.architecture.middle_layers(i)
        layers = [
            {
                "layer": layer,
                "middle": layer in middle,
                "parameters": sizes[stack.prefix, layer],
                "norms": {
                    name: norm_of.get((stack.prefix, layer), 0.0) for name, norm_of in norms.items()
                },
            }
            for layer in range(stack.count)
        ]
        stacks.append({"stack": stack.prefix, "middle": list(middle), "layers": layers})
    return {
        "stacks": stacks,
        "outside": {name: norm_of.get(("", None), 0.0) for name, norm_of in norms.items()},
    }


def layer_norms(plan: Plan, progress: Progress) -> LayerNorms:
    """(stack, layer) -> norm of all that the plan changes there; ("", None) is outside the layers.

    A LoRA's norm comes from its factors; for anything else the merged tensor is compared with the
    base, so the base's weights are read at those sites.
    """
    changes = plan.changes()
    squares: dict[tuple[str, int | None], float] = {}
    names = ", ".join(adapter.name for adapter in plan.adapters)
    with progress.stage(f"norms of {names}", len(changes), "tensors") as advance:
        for name, change in changes.items():
            start = plan.base.tensors.get(plan.base.tied.get(name, name))
            place = (change.site.stack, change.site.layer)
            squares[place] = squares.get(place, 0.0) + change_norm(change, start) ** 2
            advance(1)
    return {place: sqrt(square) for place, square in squares.items()}


def rendered(facts: Mapping[str, Any]) -> RenderableType:
    """`layer_map`'s facts for a terminal: a table for each stack, a bar for each layer."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_stack_table(stack) for stack in facts["stacks"]]
    parts += [
        Text(f"{name}: norm {norm:.3g} outside the layers")
        for name, norm in facts["outside"].items()
        if norm
    ]
    return Group(*parts)


def _stack_table(stack: Mapping[str, Any]) -> Table:
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    adapters = list(stack["layers"][0]["norms"])
    table = Table(title=Text(f"layers of {stack['stack']}"), title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("parameters", justify="right")
    for name in adapters:
        table.add_column(Text(name), justify="right")
        table.add_column("", width=30)
    # one scale for all of them, so that two adapters can be told apart by the length of their bars
    largest = max((n for row in stack["layers"] for n in row["norms"].values()), default=0.0)
    for row in stack["layers"]:
        cells: list[RenderableType] = []
        for name in adapters:
            norm = row["norms"][name]
            cells += [f"{norm:.3g}" if norm else "-", Bar(largest or 1.0, 0.0, norm, width=30)]
        table.add_row(
            str(row["layer"]), "middle" if row["middle"] else "", f"{row['parameters']:,}", *cells
        )
    return table
