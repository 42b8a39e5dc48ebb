"""How several adapters become one, as data for the recipe, the manifest and the parity check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from adaptrix_export.errors import RecipeError
from adaptrix_export.plan.methods import DENSITY, METHODS
from adaptrix_export.plan.site import Site


@dataclass(frozen=True)
class Weight:
    """The factor of one adapter: `default`, except in `layers`, pairs of (layer, factor)."""

    default: float = 1.0
    layers: tuple[tuple[int, float], ...] = ()

    def at(self, site: Site) -> float:
        return dict(self.layers).get(-1 if site.layer is None else site.layer, self.default)

    def __repr__(self) -> str:
        if not self.layers:
            return repr(self.default)
        named = ", ".join(f"{layer}: {weight!r}" for layer, weight in self.layers)
        return f"{{{named}, else {self.default!r}}}"


@dataclass(frozen=True)
class Composition:
    """A method of `methods.py`, its options, and (adapter, weight) for weights other than 1.

    `density`: share of the values that are kept; `rank`: of the result (None: the largest of the
    adapters); `election`: "total" (by the sum of the values) or "frequency" (by their number);
    `seed`: of random masks.
    """

    method: str = "cat"
    weights: tuple[tuple[str, Weight], ...] = ()
    density: float | None = None
    rank: int | None = None
    election: str = "total"
    seed: int = 0

    def weight(self, adapter: str, site: Site) -> float:
        return dict(self.weights).get(adapter, Weight()).at(site)

    @property
    def effective_density(self) -> float:
        """`density`, or the default."""
        return DENSITY if self.density is None else self.density

    @property
    def plain(self) -> bool:
        """Whether this equals stock PEFT with all adapters active."""
        return self.method == "cat" and all(w == Weight() for _, w in self.weights)

    def __repr__(self) -> str:
        """The history line: the method, and the options that it reads and that were given."""
        options = [f"method={self.method!r}"]
        if self.weights:
            options.append("weights={" + ", ".join(f"{n}: {w!r}" for n, w in self.weights) + "}")
        read = METHODS[self.method].options
        values = {"density": self.effective_density, "rank": self.rank, "election": self.election}
        for name, value in {**values, "seed": self.seed}.items():
            if name in read and value is not None:
                options.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(options)})"

    def as_dict(self) -> dict[str, Any]:
        """For a manifest or a job; `from_dict` is its inverse."""
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document["weights"] = {
            name: {"default": w.default, "layers": {str(i): v for i, v in w.layers}}
            for name, w in self.weights
        }
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Composition:
        weights = tuple(
            (name, Weight(w["default"], tuple((int(i), v) for i, v in w["layers"].items())))
            for name, w in document["weights"].items()
        )
        return cls(**{**document, "weights": weights})


def check_options(composition: Composition) -> None:
    """Raise RecipeError for an unknown method, and for options that the method does not read."""
    method = METHODS.get(composition.method)
    if method is None:
        raise RecipeError(
            "compose.method", repr(composition.method), f"one of {', '.join(METHODS)}"
        )
    is_set = {"density": composition.density is not None, "rank": composition.rank is not None}
    is_set.update(election=composition.election != "total", seed=composition.seed != 0)
    unread = [n for n, was_set in is_set.items() if was_set and n not in method.options]
    if unread:
        raise RecipeError(
            f"compose.{unread[0]}", f"given with method {composition.method}",
            "one of " + ", ".join(m for m, row in METHODS.items() if unread[0] in row.options),
            "leave it out",
        )  # fmt: skip
    if composition.density is not None and not 0 < composition.density <= 1:
        raise RecipeError("compose.density", repr(composition.density), "above 0 and at most 1")
