"""Context preservation: gates that bound how far adapters may move each site from the base.

    clamp   y = y0 + m min(1, tau |y0| / |d|) d     so |y - y0| <= tau |y0|, token by token
    mask    y = y0 + m d                            padding is untouched, all else is the adapter's
    blend   y = y0 + weight d                       merged into the weights, exactly

y0 is the base's output at a site, d what the adapters add there, m the token's mask. The pass only
says which site gets which gate; lowering draws them (`graph/rewrite/gates.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from adaptrix_export.errors import AdapterError
from adaptrix_export.load.fit.invariants import ungateable
from adaptrix_export.plan import Adjustment, Gate, Plan, Site

PerLayer = tuple[tuple[int, float], ...]  # (layer, value), in order


@dataclass(frozen=True)
class WireContext:
    """One gate for each site that an adapter changes.

    `tau` is for "clamp", `weight` for "blend": one number for every site, or one for each layer
    named, and then only those layers are gated. `scope` "layer" makes tau the budget of a layer:
    each of its k gated sites gets tau / sqrt(k), so that over the sites of a layer the sum of
    (|y - y0| / |y0|)^2 is at most tau^2. `on_mismatch` "drop" merges the sites that cannot be
    gated and records them; "error" raises.
    """

    mode: str = "clamp"
    tau: float | PerLayer | None = None
    weight: float | PerLayer | None = None
    scope: str = "site"
    stats: bool = False
    on_mismatch: str = "error"

    def __call__(self, plan: Plan) -> Plan:
        """Raises AdapterError for a layer that no adapter changes, UnsupportedError for a site
        that cannot be gated."""
        chosen = self.tau if self.mode == "clamp" else self.weight
        sites = list(self._sites(plan, chosen))
        gateable, dropped = [], []
        for site in sites:
            error = ungateable(plan, site, self.mode)
            if error is None:
                gateable.append(site)
            elif self.on_mismatch == "drop":
                text = f"not gated, merged instead: {error.found}"
                dropped.append(Adjustment(plan.adapters[0].name, "ungated", site.path, text))
            else:
                raise error
        if not gateable:
            raise AdapterError(
                "context", "no site that can be gated", "at least one", "build without context"
            )
        gates = tuple(self._gate(site, chosen, gateable) for site in gateable)
        stats = self.stats and self.mode != "blend"
        adjustments = (*plan.adjustments, *dropped)
        return plan.after(self, gates=gates, gate_stats=stats, adjustments=adjustments)

    def _sites(self, plan: Plan, chosen: float | PerLayer | None) -> Iterator[Site]:
        """The sites with deltas, those of the chosen layers only where layers are chosen."""
        changed = {delta.site for adapter in plan.adapters for delta in adapter.deltas}
        layers = {layer for layer, _ in chosen} if isinstance(chosen, tuple) else None
        lost = (layers or set()) - {site.layer for site in changed}
        if lost:
            there = sorted({site.layer for site in changed if site.layer is not None})
            raise AdapterError(
                f"context: layer {min(lost)}", "no site of an adapter",
                f"one of the layers {', '.join(map(str, there)) or '(none)'}",
            )  # fmt: skip
        for site in sorted(changed, key=lambda s: s.order):
            if layers is None or site.layer in layers:
                yield site

    def _gate(self, site: Site, chosen: float | PerLayer | None, gated: list[Site]) -> Gate:
        value = dict(chosen).get(site.layer or 0) if isinstance(chosen, tuple) else chosen
        if self.mode == "blend":
            return Gate(site, self.mode, weight=value)
        if self.mode == "mask" or value is None:
            return Gate(site, self.mode)
        if self.scope == "layer":
            value /= sqrt(sum((s.stack, s.layer) == (site.stack, site.layer) for s in gated))
        return Gate(site, self.mode, tau=value)
