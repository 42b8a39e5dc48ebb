"""How several adapters become one, as data: what a recipe says, a manifest keeps, a check reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from adaptrix_export.plan.methods import DENSITY, METHODS

if TYPE_CHECKING:
    from adaptrix_export.plan import Site


@dataclass(frozen=True)
class Weight:
    """The factor of one adapter: `default`, but for the layers of `layers`, (layer, factor)."""

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
    """A method of `methods.py`, its options, and (adapter, weight) of each that is not 1.

    `density` is the share of values that is kept, `rank` that of the result (None: the largest
    among the adapters), `election` "total" (by the sum of the values) or "frequency" (by their
    number), `seed` that of random draws.
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
    def kept(self) -> float:
        """`density`, or the default."""
        return DENSITY if self.density is None else self.density

    @property
    def plain(self) -> bool:
        """Whether this is what stock PEFT does with every adapter active."""
        return self.method == "cat" and all(w == Weight() for _, w in self.weights)

    def __repr__(self) -> str:
        """The history line: the method, and the options that it reads and that were given."""
        told = [f"method={self.method!r}"]
        if self.weights:
            told.append("weights={" + ", ".join(f"{n}: {w!r}" for n, w in self.weights) + "}")
        read = METHODS[self.method].options
        values = {"density": self.kept, "rank": self.rank, "election": self.election}
        for name, value in {**values, "seed": self.seed}.items():
            if name in read and value is not None:
                told.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"

    def as_dict(self) -> dict[str, Any]:
        """For a manifest or a job; `from_dict` is its inverse."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["weights"] = {
            name: {"default": w.default, "layers": {str(i): v for i, v in w.layers}}
            for name, w in self.weights
        }
        return found

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Composition:
        weights = tuple(
            (name, Weight(w["default"], tuple((int(i), v) for i, v in w["layers"].items())))
            for name, w in document["weights"].items()
        )
        return cls(**{**document, "weights": weights})
