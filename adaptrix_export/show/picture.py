"""The model as a picture: a table of layers x modules for each stack, each cell with its colour.

Cells are numbers from 0 to 1 that the page turns into a colour, so that light and dark need no
second picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log10, sqrt

from adaptrix_export.package.documents import GatedSite
from adaptrix_export.show.facts import Facts, Place

DECADES = 2.0  # norms from the largest down to a hundredth of it have a colour of their own
FAINTEST = 0.08  # a site that is changed at all can be told from one that is not
MOST_ADAPTERS = 8  # on one page; the manifest lists them all


@dataclass(frozen=True)
class Cell:
    """`share` is None for a site that is not changed; `known` is False where no figure is."""

    share: float | None
    text: str
    known: bool = True
    gated: bool = False


@dataclass(frozen=True)
class Row:
    module: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Picture:
    """One stack of layers under one adapter."""

    title: str
    hue: str  # the name of a colour of the page
    layers: tuple[int, ...]
    rows: tuple[Row, ...]
    legend: str

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Layers that get a number below the picture: about eight, however many there are."""
        step = max(1, round(len(self.layers) / 8))
        return self.layers[::step]


def energy_pictures(facts: Facts) -> list[Picture]:
    """For each adapter the norms of its deltas as they came and, if moved, as they are now."""
    energy, context = facts.manifest.energy, facts.manifest.context
    if energy is None:
        return []
    after = energy.after or {}
    stages = [("as it came", energy.before), ("as it is now", after)]
    now = energy.before if energy.after is None else energy.after
    gated = {Place.of(gate.site) for gate in (context.gates if context else ())}
    pictures: list[Picture] = []
    for name in list(energy.before)[:MOST_ADAPTERS]:
        norms = {stage: _by_place(energies[name]) for stage, energies in stages if name in energies}
        pictures += _of_adapter(name, norms, gated if name in now else set(), energy.layers)
    composed = [name for name in after if name not in energy.before]
    for name in composed[:MOST_ADAPTERS]:
        norms = {"composed": _by_place(after[name])}
        pictures += _of_adapter(name, norms, gated, energy.layers)
    return pictures


def gate_pictures(facts: Facts) -> list[Picture]:
    """For each adapter how far its gates were open in the proof, 1 being fully open."""
    context = facts.report.context if facts.report else None
    by_adapter: dict[str, dict[Place, Cell]] = {}
    for line in context.sites if context else ():
        if line.gate_mean is not None:
            cells = by_adapter.setdefault(line.adapter or "", {})
            cells[Place.of(line.site)] = _gate_cell(line, line.gate_mean)
    counts = facts.manifest.energy.layers if facts.manifest.energy else {}
    pictures = []
    for name, cells in list(by_adapter.items())[:MOST_ADAPTERS]:
        title = f"{name}: mean gate" if name else "mean gate"
        legend = "pale: the adapter is held back; full colour: it acts in full"
        pictures += _pictures(title, "gate", cells, legend, counts)
    return pictures


def _gate_cell(line: GatedSite, mean: float) -> Cell:
    text = f"{line.site}: gate mean {mean:.3f}, least {line.gate_min or 0.0:.3f}, "
    return Cell(mean, text + f"{100 * (line.clamped or 0.0):.0f}% of tokens clamped")


def _of_adapter(
    name: str,
    stages: Mapping[str, Mapping[Place, float | None]],
    gated: set[Place],
    counts: Mapping[str, int],
) -> list[Picture]:
    """All stages of an adapter on one scale, so that they can be compared by eye."""
    known = [n for norms in stages.values() for n in norms.values() if n]
    largest = max(known, default=1.0)
    pictures = []
    for stage, norms in stages.items():
        last = stage == list(stages)[-1]
        cells = {
            place: Cell(
                _share(norm, largest),
                f"{_path(place)}: {'changed' if norm is None else f'norm {norm:.3g}'}"
                + (", gated" if last and place in gated else ""),
                norm is not None,
                last and place in gated,
            )
            for place, norm in norms.items()
        }
        title = f"{name}, {stage}" if len(stages) > 1 else name
        total = sqrt(sum(n**2 for n in norms.values() if n))
        legend = f"norm {total:.3g} in all; full colour is {largest:.3g}, palest a hundredth of it"
        pictures += _pictures(title, "energy", cells, legend, counts)
    return pictures


def _pictures(
    title: str, hue: str, cells: Mapping[Place, Cell], legend: str, counts: Mapping[str, int]
) -> list[Picture]:
    """One picture a stack; what lies outside of the layers is a picture of one column."""
    pictures = []
    for stack in sorted({place.stack for place in cells}):
        inside = {place: cell for place, cell in cells.items() if place.stack == stack}
        numbers = [place.layer for place in inside if place.layer is not None]
        deepest = max(numbers) + 1 if numbers else 0
        layers = tuple(range(max(deepest, counts.get(stack, 0)) if numbers else 0))
        columns: tuple[int | None, ...] = layers or (None,)
        rows = tuple(
            Row(
                module,
                tuple(
                    inside.get(Place(stack, layer, module), Cell(None, "not changed"))
                    for layer in columns
                ),
            )
            for module in _modules(place.module for place in inside)
        )
        where = f"{title}, {stack}" if stack else f"{title}, outside of the layers"
        pictures.append(Picture(where, hue, layers, rows, legend))
    return pictures


def _modules(names: Iterable[str]) -> list[str]:
    """Attention before the MLP, as a token meets them; names of one block in their usual order."""
    order = ("q_", "k_", "v_", "c_attn", "qkv", "o_", "dense", "gate", "up", "fc1", "down", "fc2")

    def key(module: str) -> tuple[bool, str, int, str]:
        block, _, leaf = module.rpartition(".")
        place = next((i for i, start in enumerate(order) if leaf.startswith(start)), len(order))
        return ("mlp" in block or "ffn" in block, block, place, leaf)

    return sorted(set(names), key=key)


def _by_place(norms: Mapping[str, float | None]) -> dict[Place, float | None]:
    """The norm of all parameters at one place (a weight and its bias, the experts of a layer)."""
    squares: dict[Place, float | None] = {}
    for name, norm in norms.items():
        place = Place.of(name.removesuffix(".bias"))
        before = squares.get(place, 0.0)
        squares[place] = None if norm is None or before is None else before + norm**2
    return {place: None if s is None else sqrt(s) for place, s in squares.items()}


def _share(norm: float | None, largest: float) -> float:
    if norm is None:
        return FAINTEST
    if norm <= 0:
        return 0.0
    return round(max(FAINTEST, 1 + log10(norm / largest) / DECADES), 3)


def _path(place: Place) -> str:
    inside = place.layer is not None
    return f"{place.stack}.{place.layer}.{place.module}" if inside else place.module
