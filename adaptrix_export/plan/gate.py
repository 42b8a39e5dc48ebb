"""Gates, which scale the adapters' contribution at a site."""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.plan.site import Site


@dataclass(frozen=True)
class Gate:
    """A function of the adapters' contribution d at one site and the base's output y0.

    With m the token's mask, the output is y0 + m min(1, tau |y0| / |d|) d for "clamp", y0 + m d for
    "mask", and y0 + weight d for "blend". Only "blend" can be merged; the others depend on the
    data.
    """

    site: Site
    mode: str
    tau: float | None = None
    weight: float | None = None

    @property
    def depends_on_data(self) -> bool:
        return self.mode != "blend"


def clamp_slope(tau: float, width: int) -> float:
    """The factor of |y0| / |d| in a clamp to `tau`, for outputs of `width` values.

    It is tau minus the float32 rounding error: 2^-24 for each of the `width` squares in a norm, in
    any order of summation, and 2^-22 |y0| for y0 + g d.
    """
    return max(0.0, tau * (1 - (width + 16) * 2.0**-24) - 2.0**-22)
