"""How a plan is lowered, beyond what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptrix_export.graph.frontends.draw import Trial
    from adaptrix_export.precision.settings import Quantization


@dataclass(frozen=True)
class LowerOptions:
    """`frontend` names what draws a graph, `trial` tries it on a small replica first.

    `rows`: a switchable graph has its adapters inside, one for each row of a batch. `quantization`:
    how the weights are rounded; None for float32.
    """

    frontend: str = "auto"
    provider: str = "cpu"
    trial: Trial | None = None
    rows: bool = False
    quantization: Quantization | None = None


DEFAULTS = LowerOptions()
