"""How a plan is lowered, beyond what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptrix_export.precision.settings import FLOAT32, Storage

if TYPE_CHECKING:
    from adaptrix_export.graph.frontends.draw import Trial


@dataclass(frozen=True)
class LowerOptions:
    """`frontend` names what draws a graph, `trial` tries it on a small replica first.

    `rows`: a switchable graph has its adapters inside, one for each row of a batch. `storage`: how
    the weights of a graph are stored.
    """

    frontend: str = "auto"
    provider: str = "cpu"
    trial: Trial | None = None
    rows: bool = False
    storage: Storage = FLOAT32


DEFAULTS = LowerOptions()
