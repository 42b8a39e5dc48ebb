"""`matrix:` in a recipe: one build for each combination of values.

    matrix:
      precision: [fp32, int4]
      adapter: [./sql, ./poems]
      layers: [3, 5]

A key is any key of a recipe, dotted (`parity.level`), or a short form of one, as flags have them.
`out` is then a folder of artifacts: `out/precision-fp32_adapter-sql_layers-3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe.messages import shown
from adaptrix_export.recipe.recipe import MATRIX, Recipe, assign, make_recipe, with_overrides
from adaptrix_export.recipe.sections import default_name

MOST = 10_000  # builds of one recipe; more is probably a mistake
SHORT = {
    "parity": "parity.level",
    "layers": "redistribute.layers",
    "strategy": "redistribute.strategy",
    "tau": "context.tau",
}
_ODD = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class Cell:
    """One build of a matrix. `label` names its values; empty where there is no matrix."""

    label: str
    recipe: Recipe


def cells(
    document: Mapping[str, Any], place: str = "recipe", overrides: Iterable[str] = ()
) -> list[Cell]:
    """The validated builds of one document; the last key of the matrix varies fastest.

    `overrides` are `key=value` for every build. Raises RecipeError.
    """
    plain = {key: value for key, value in document.items() if key != MATRIX}
    axes = _axes(document.get(MATRIX), place)
    overrides = list(overrides)
    if not axes:
        return [Cell("", make_recipe(plain, place, overrides=overrides))]
    builds: dict[str, Cell] = {}
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        label = "_".join(_label(key, value) for key, value in chosen.items())
        changed = deepcopy(plain)
        for key, value in chosen.items():
            assign(changed, SHORT.get(key, key), deepcopy(value))
        changed = with_overrides(changed, overrides)
        out = changed.get("out")
        if isinstance(out, str):
            changed["out"] = f"{out.rstrip('/')}/{label}"
        if label in builds:
            raise RecipeError(
                f"{place}: {MATRIX}", f"two builds named {label}", "values that differ in name",
                "give the adapters names: {source: ..., name: ...}",
            )  # fmt: skip
        builds[label] = Cell(label, make_recipe(changed, f"{place} ({label})"))
    return list(builds.values())


def _axes(matrix: Any, place: str) -> dict[str, Sequence[Any]]:
    where = f"{place}: {MATRIX}"
    if matrix is None:
        return {}
    if not isinstance(matrix, Mapping) or not matrix:
        raise RecipeError(
            where, shown(matrix), "keys with lists of values, precision: [fp32, int4]"
        )
    builds = 1
    for key, values in matrix.items():
        if key == "out":
            raise RecipeError(f"{where}.out", "a list of folders", "`out` once, for all builds")
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{where}.{key}", shown(values), "a list of values")
        builds *= len(values)
    if builds > MOST:
        raise RecipeError(where, f"{builds:,} builds", f"at most {MOST:,}")
    return dict(matrix)


def _label(key: str, value: Any) -> str:
    return f"{_plain(key.rpartition('.')[2])}-{_plain('-'.join(_words(key, value)))}"


def _words(key: str, value: Any) -> Iterator[str]:
    """The parts of a value's name in a folder's name."""
    if isinstance(value, Mapping):
        named = value.get("name") or value.get("source")
        yield from _words(key, named) if named else (str(part) for part in value.values())
    elif isinstance(value, list):
        for part in value:
            yield from _words(key, part)
    elif isinstance(value, str) and key.partition(".")[0] in ("adapter", "adapters", "base"):
        yield default_name(value)
    else:
        yield str(value).lower() if isinstance(value, bool) else str(value)


def _plain(text: str) -> str:
    return _ODD.sub("-", text).strip("-.") or "none"
