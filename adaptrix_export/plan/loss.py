"""The error of an approximation of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ApproximationLoss:
    """|delta - approximation| / |delta| in Frobenius norms: `error` over all sites together,
    `worst` at the worst `site`. 0 is exact."""

    adapter: str
    rank: int
    error: float
    worst: float
    site: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "error": self.error, "worst": self.worst, "worst_site": self.site
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"adapter {self.adapter} is approximated at rank {self.rank}: {100 * self.error:.2g}% "
            f"of its delta is lost, {100 * self.worst:.2g}% at {self.site}"
        )
