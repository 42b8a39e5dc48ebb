"""The recipe's `compose`: how several adapters become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from adaptrix_export.plan.composition import Composition, Weight, check_options
from adaptrix_export.recipe.messages import one_of, refusal, shown

if TYPE_CHECKING:
    from adaptrix_export.recipe.sections import ComposeSpec

AUTO = "auto"  # no method: chosen by `passes/compose/choose.py`


def composition_of(spec: ComposeSpec, names: Sequence[str]) -> Composition:
    """The method and options of a recipe for adapters of these names, in order; not for `auto`."""
    return Composition(
        spec.method,
        weights_of(spec.weights, names),
        spec.density,
        spec.rank,
        spec.election.value,
        spec.seed,
    )


def weights_of(weights: Any, names: Sequence[str]) -> tuple[tuple[str, Weight], ...]:
    """(adapter, weight) for weights other than 1; layers without a weight have weight 1."""
    pairs = (
        weights.items() if isinstance(weights, Mapping) else zip(names, weights or (), strict=False)
    )
    changed = []
    for name, value in pairs:
        layers = tuple(sorted(value.items())) if isinstance(value, Mapping) else ()
        weight = Weight(1.0 if layers or isinstance(value, Mapping) else float(value), layers)
        if weight != Weight():
            changed.append((name, weight))
    return tuple(sorted(changed))


def check_weights(weights: Any) -> None:
    """Refuse all but a list of finite numbers, name: number, and name: {layer: number}."""
    values = list(weights.values()) if isinstance(weights, Mapping) else weights
    if weights is not None and not isinstance(values, (list, tuple)):
        raise refusal(shown(weights), "a list of numbers, or name: number")
    for value in values or ():
        by_layer = isinstance(value, Mapping) and isinstance(weights, Mapping)
        for number in value.values() if by_layer else [value]:
            try:
                finite = isfinite(float(number))
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise refusal(shown(number), "a finite number, or for a name {layer: number}")


def check_compose(spec: ComposeSpec, names: Sequence[str]) -> None:
    """Refuse weights and texts of unknown adapters, and options that the method does not read."""
    auto = spec.method == AUTO
    if spec.calibration and not auto:
        raise refusal("given", "method auto", "leave it out", key="compose.calibration")
    if auto:
        settled = {"weights": spec.weights, "density": spec.density, "rank": spec.rank}
        chosen = next((key for key, value in settled.items() if value is not None), None)
        if chosen:
            raise refusal(
                "given with method auto", "a method by name",
                "auto chooses it; leave it out", key=f"compose.{chosen}",
            )  # fmt: skip
    if isinstance(spec.weights, tuple) and len(spec.weights) != len(names):
        raise refusal(
            f"{len(spec.weights)} weights", f"{len(names)}, one for each adapter",
            key="compose.weights",
        )  # fmt: skip
    named = {"weights": spec.weights, "calibration": spec.calibration}
    for key, value in named.items():
        for name in value if isinstance(value, Mapping) else ():
            if name not in names:
                raise refusal(shown(name), one_of(names), key=f"compose.{key}")
    if not auto:
        check_options(composition_of(spec, names))
