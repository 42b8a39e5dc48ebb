"""The model as a picture: a table of layers x modules for each stack, each cell with its colour.

Cells are numbers from 0 to 1 that the page turns into a colour, so that light and dark need no
second picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log10, sqrt
from typing import Any

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
    told = facts.section("energy")
    if not told:
        return []
    stages = [("as it came", told["before"]), ("as it is now", told["after"] or {})]
    now = told["before"] if told["after"] is None else told["after"]
    counts: Mapping[str, int] = told["layers"]
    gated = {
        Place.of(gate["site"]) for gate in (facts.manifest.get("context") or {}).get("gates", ())
    }
    pictures: list[Picture] = []
    for name in list(told["before"])[:MOST_ADAPTERS]:
        norms = {stage: _by_place(energies[name]) for stage, energies in stages if name in energies}
        pictures += _of_adapter(name, norms, gated if name in now else set(), counts)
    composed = [name for name in told["after"] or {} if name not in told["before"]]
    for name in composed[:MOST_ADAPTERS]:
        pictures += _of_adapter(name, {"composed": _by_place(told["after"][name])}, gated, counts)
    return pictures


def gate_pictures(facts: Facts) -> list[Picture]:
    """For each adapter how far its gates were open in the proof, 1 being fully open."""
    lines = (facts.section("context") or {}).get("sites", ()) if facts.report else ()
    by_adapter: dict[str, dict[Place, Mapping[str, Any]]] = {}
    for line in lines:
        if "gate_mean" in line:
            by_adapter.setdefault(line.get("adapter", ""), {})[Place.of(line["site"])] = line
    counts = (facts.section("energy") or {}).get("layers", {})
    pictures = []
    for name, found in list(by_adapter.items())[:MOST_ADAPTERS]:
        title = f"{name}: mean gate" if name else "mean gate"
        cells = {
            place: Cell(
                float(line["gate_mean"]),
                f"{line['site']}: gate mean {line['gate_mean']:.3f}, least {line['gate_min']:.3f}, "
                f"{100 * line['clamped']:.0f}% of tokens clamped",
            )
            for place, line in found.items()
        }
        legend = "pale: the adapter is held back; full colour: it acts in full"
        pictures += _pictures(title, "gate", cells, legend, counts)
    return pictures


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
    found = []
    for stack in sorted({place.stack for place in cells}):
        inside = {place: cell for place, cell in cells.items() if place.stack == stack}
        numbers = [place.layer for place in inside if place.layer is not None]
        seen = max(numbers) + 1 if numbers else 0
        layers = tuple(range(max(seen, counts.get(stack, 0)) if numbers else 0))
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
        found.append(Picture(where, hue, layers, rows, legend))
    return found


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
