"""The input of a redistribution strategy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptrix_export.measure.calibration import Rows
from adaptrix_export.passes.redistribute.moved import Terms
from adaptrix_export.plan import Base
from adaptrix_export.progress import Progress

if TYPE_CHECKING:
    from adaptrix_export.oracle.layered import Live

BATCH_TOKENS = 1024  # that go through a layer at once
STEP_TOKENS = 256  # of a training step


def distill_steps(targets: int) -> int:
    """Training steps of `distill` by default: more layers have more factors to train."""
    return 100 + 20 * targets


@dataclass(frozen=True)
class StrategyInput:
    """The deltas of one stack, where they are to go, the models and the text to see them by.

    `rank` bounds what is added at a site of a target layer; `steps` are those of `distill`.
    """

    base: Base
    stack: str
    terms: Terms
    targets: tuple[int, ...]
    rank: int
    dtype: str  # of the factors that are written
    steps: int
    seed: int
    live: Live
    rows: Rows
    scratch: Path
    progress: Progress

    def path(self, layer: int, module: str) -> str:
        """The module's path in the plain model."""
        return f"{self.stack}.{layer}.{module}"
