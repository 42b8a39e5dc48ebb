"""Gates: what becomes of an adapter's contribution at a site."""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.plan.site import Site


@dataclass(frozen=True)
class Gate:
    """What becomes of the adapters' contribution d at one site, beside the base's output y0.

    With m the token's mask: "clamp" gives y0 + m min(1, tau |y0| / |d|) d, "mask" y0 + m d, and
    "blend" y0 + weight d, which a weight can hold; the first two depend on the data.
    """

    site: Site
    mode: str
    tau: float | None = None
    weight: float | None = None

    @property
    def depends_on_data(self) -> bool:
        return self.mode != "blend"


def clamp_slope(tau: float, width: int) -> float:
    """What a clamp to `tau` multiplies |y0| / |d| by, for outputs of `width` numbers.

    It is tau less what float32 can be off by: norms of `width` squares, by 2^-24 for each in
    whatever order they are summed, and y0 + g d, by 2^-22 |y0|.
    """
    return max(0.0, tau * (1 - (width + 16) * 2.0**-24) - 2.0**-22)
