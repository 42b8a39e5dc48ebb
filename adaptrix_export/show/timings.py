"""How long the stages of a build took, and what was kept of that for the page.

An artifact holds no clock: the same inputs give the same bytes. So the timings lie in the cache of
the machine that built it, by the hash of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrix_export.progress import Advance, Progress
from adaptrix_export.prove.preflight.preflight import cache_folder
from adaptrix_export.runtime.files import MANIFEST

if TYPE_CHECKING:
    from rich.table import Table

KEPT = 200  # files; the oldest go


@dataclass(frozen=True)
class Stage:
    """`depth` is the number of stages that it is inside of."""

    name: str
    seconds: float
    amount: str
    peak_bytes: int
    depth: int = 0


@dataclass
class Timed:
    """A Progress that passes everything on, and keeps the time of every stage."""

    inner: Progress
    stages: list[Stage] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _depth: int = 0

    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Advance]:
        return self._stage(name, total, unit)

    @contextmanager
    def _stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        start, done, depth = time.perf_counter(), 0, self._depth
        place = len(self.stages)  # a stage comes before those that it has inside
        self._depth += 1

        def counted(amount: int) -> None:
            nonlocal done
            done += amount
            advance(amount)

        try:
            with self.inner.stage(name, total, unit) as advance:
                yield counted
        finally:
            self._depth -= 1
        seconds = time.perf_counter() - start
        self.stages.insert(place, Stage(name, seconds, _amount(done, unit), _peak(), depth))

    def note(self, text: str) -> None:
        self.inner.note(text)

    def as_dict(self) -> dict[str, Any]:
        """Stages in the order in which they began; `peak_bytes` is the process's until then."""
        seconds = time.perf_counter() - self._start
        return {"seconds": seconds, "stages": [asdict(stage) for stage in self.stages]}


def timings_table(timings: Mapping[str, Any]) -> Table:
    """What a build says of its time at the end."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title="time by stage", title_justify="left")
    shown.add_column("stage")
    for heading in ("time", "share", "done", "peak memory so far"):
        shown.add_column(heading, justify="right")
    whole = timings["seconds"]
    for stage in timings["stages"]:
        shown.add_row(
            Text("  " * stage["depth"] + stage["name"]),
            f"{stage['seconds']:.1f} s",
            f"{100 * stage['seconds'] / whole:.0f}%",
            stage["amount"],
            f"{stage['peak_bytes'] / 1e9:.2f} GB",
        )
    shown.caption, shown.caption_justify = f"{whole:.1f} s in all", "left"
    return shown


def keep_timings(artifact: Path, timings: Mapping[str, Any]) -> None:
    """Put them where `kept_timings` looks; nothing is kept without a manifest or a cache."""
    if not (artifact / MANIFEST).is_file():
        return
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*.json"), key=_age)[:-KEPT]:
            old.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(timings, file)
        os.replace(file.name, folder / f"{_key(artifact)}.json")
    except OSError as error:  # the artifact is published, and that is what was asked for
        logging.getLogger(__name__).warning("timings were not kept: %s", error)


def _age(path: Path) -> float:
    """When a file was written; one that another build has just removed is the oldest."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def kept_timings(artifact: Path) -> dict[str, Any] | None:
    """The timings of an artifact that this machine built, else None."""
    if not (artifact / MANIFEST).is_file():
        return None
    path = _folder() / f"{_key(artifact)}.json"
    try:
        timings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return timings if isinstance(timings, dict) else None


def _key(artifact: Path) -> str:
    return hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()


def _folder() -> Path:
    return cache_folder() / "timings"


def _amount(done: int, unit: str) -> str:
    if not done:
        return ""
    if unit in ("B", "bytes"):
        return f"{done / 1e6:.0f} MB"
    return f"{done:,} {unit}".rstrip()


def _peak() -> int:
    """The largest memory of this process and of its children that have ended, so far."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kB but on macOS
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * scale
