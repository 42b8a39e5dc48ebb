"""sha256 of files: streamed, and for the inputs on a thread of its own while weights are merged."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import digest_of

if TYPE_CHECKING:
    from adaptrix_export.plan import Plan


@dataclass(frozen=True)
class FileHash:
    """Size and sha256 (hexadecimal) of one file."""

    bytes: int
    sha256: str

    def as_dict(self) -> dict[str, object]:
        return {"bytes": self.bytes, "sha256": self.sha256}


def hash_file(path: Path) -> FileHash:
    """Read `path` once, in blocks."""
    return FileHash(*digest_of(path))


def hash_folder(folder: Path, skip: frozenset[str] = frozenset()) -> dict[str, FileHash]:
    """Every file under `folder`, by its path with forward slashes, sorted."""
    return {name: hash_file(path) for name, path in sorted(files_under(folder)) if name not in skip}


def files_under(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def odd_entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, description) of links, special files and empty folders under `folder`."""
    for root, folders, files in os.walk(folder):
        place = Path(root)
        if place != folder and not folders and not files:
            yield place.relative_to(folder).as_posix(), "an empty folder"
        for path in (place / name for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                yield path.relative_to(folder).as_posix(), "a link"
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                yield path.relative_to(folder).as_posix(), "no regular file"


@dataclass(frozen=True)
class InputFile:
    """One input file: the spec it belongs to, its path in that folder, its hash."""

    spec: str
    file: str
    hash: FileHash


class InputHashes:
    """Computes the hashes of all base and adapter files in a thread, started by the constructor.

    The thread is a daemon, so that an interrupted build does not wait for it.
    """

    def __init__(self, plan: Plan, hasher: Callable[[Path], FileHash] = hash_file) -> None:
        self._files = list(_input_files(plan))
        self._hasher = hasher
        self._done: list[InputFile] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="input-hashes", daemon=True)
        self._thread.start()

    def result(self) -> list[InputFile]:
        """Wait for the hashes, in plan order. Raises SourceError if a file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise SourceError(
                str(self._error.filename), f"cannot be read any more ({self._error.strerror})"
            ) from self._error
        return self._done

    def _run(self) -> None:
        try:
            for spec, name, path in self._files:
                self._done.append(InputFile(spec, name, self._hasher(path)))
        except OSError as error:
            self._error = error  # raised by result(), in the thread that waits for it


def _input_files(plan: Plan) -> Iterator[tuple[str, str, Path]]:
    """(spec, file name, path) of all files that the weights depend on: tensors and configs."""
    base = plan.base
    sources = [(base.spec, base.folder, base.files, "config.json")]
    sources += [(a.spec, a.folder, a.files, "adapter_config.json") for a in plan.adapters]
    for spec, folder, files, config in sources:
        beside = folder / config
        # A .gguf file carries its own config; one that lies beside it is not read.
        read = base.gguf_file is None or folder is not base.folder
        extra = (beside,) if read and beside.is_file() and beside not in files else ()
        for path in (*files, *extra):
            yield spec, path.relative_to(folder).as_posix(), path
