"""Temporary folders. A killed run leaves its own behind, and the next one removes them.

Beside the folder that is handed out lies a file that its process keeps locked. The lock ends with
the process, however that ends, so whoever gets the lock knows that the owner is gone.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

PREFIX = "adaptrix-"
OWNER, FILES = "owner", "files"


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """A new, empty folder in the system's temporary one; gone when the block ends."""
    _remove_abandoned(tempfile.gettempdir())
    place, lock = _new(kind)
    try:
        yield place / FILES
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _new(kind: str) -> tuple[Path, BaseFileLock]:
    """A folder and its lock, taken. Another run may find it before it is locked, and remove it."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-"))
        lock = FileLock(place / OWNER)
        try:
            lock.acquire()
            (place / FILES).mkdir()
        except FileNotFoundError:
            lock.release()
            continue
        return place, lock


def lasting_scratch(kind: str) -> Path:
    """A scratch folder that is gone when this process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder(kind))


@cache  # once in a process, for each temporary folder
def _remove_abandoned(folder: str) -> None:
    """Remove scratch folders of this user whose process is gone."""
    with os.scandir(folder) as entries:
        ours = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
        ]
    for place in ours:
        with suppress(OSError):  # another run removes it, or it is another user's
            if place.stat().st_uid == os.getuid() and (place / OWNER).is_file():
                _remove_if_dead(place)


def _remove_if_dead(place: Path) -> None:
    with suppress(Timeout), FileLock(place / OWNER, timeout=0):
        shutil.rmtree(place, ignore_errors=True)
