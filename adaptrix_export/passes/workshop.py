"""Where a pass may leave files, and whom it tells how far it is; as long as the build lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from adaptrix_export.progress import Progress


@dataclass(frozen=True)
class Workshop:
    """A scratch folder that plans may refer to, and a Progress."""

    folder: Path
    progress: Progress

    def folder_for(self, name: str) -> Path:
        """A new, empty folder."""
        made = self.folder / name
        made.mkdir()
        return made


@contextmanager
def workshop(progress: Progress) -> Iterator[Workshop]:
    """A workshop whose folder is gone when the block ends."""
    with TemporaryDirectory(prefix="adaptrix-passes-") as folder:
        yield Workshop(Path(folder), progress)
