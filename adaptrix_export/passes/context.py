"""What passes share while a plan is made: a scratch folder, a progress, and held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.progress import Progress

HELD_OUT = "held_out.npy"


@dataclass(frozen=True)
class PassContext:
    """A scratch folder that plans may refer to, and a Progress."""

    folder: Path
    progress: Progress

    def folder_for(self, name: str) -> Path:
        """A new, empty folder."""
        made = self.folder / name
        made.mkdir()
        return made

    def hold_out(self, rows: NDArray[np.int64]) -> None:
        """Keep token ids (rows, tokens) to measure on, which no pass has seen."""
        np.save(self.folder / HELD_OUT, rows, allow_pickle=False)

    def held_out(self) -> NDArray[np.int64] | None:
        """The rows that a pass has kept, the last ones; None where none did."""
        place = self.folder / HELD_OUT
        return np.load(place, allow_pickle=False) if place.exists() else None


@contextmanager
def pass_context(progress: Progress) -> Iterator[PassContext]:
    """A context whose folder is gone when the block ends."""
    with scratch_folder("passes") as folder:
        yield PassContext(folder, progress)
