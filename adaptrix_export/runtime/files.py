"""The files of an artifact, each hashed against the manifest before it is used.

A folder without a manifest, which a build that is not published yet lacks, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError

MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # sha256 of the manifest's text without it
DATA_SUFFIXES = (".onnx_data", ".onnx.data")  # of the weights beside a graph, in either layout
_BLOCK = 4 * 2**20  # large enough that reading and hashing run free of the interpreter lock
_MOST_JSON = 256 * 2**20  # bytes; the manifest of a model with 10,000 tensors has 3 MB
_CHANGED = "it was changed or damaged; build it again, or load it with check=False (--no-check)"


def digest_of(path: Path) -> tuple[int, str]:
    """Size and sha256 (hexadecimal) of a file, read once, in blocks."""
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
    return size, digest.hexdigest()


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The one text that a manifest has, its checksum renewed."""
    bare = {key: value for key, value in manifest.items() if key != CHECKSUM}
    checksum = hashlib.sha256(_dumped(bare).encode()).hexdigest()
    return _dumped({**bare, CHECKSUM: checksum})


def _dumped(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SourceError for anything else; a missing file is an empty object."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise SourceError(str(path), "no regular file", "a JSON object", "build again")
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"more than {_MOST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            str(path), f"not JSON ({error})", "a JSON object", "build again"
        ) from error
    if not isinstance(content, dict):
        raise SourceError(str(path), f"a JSON {type(content).__name__}", "an object", "build again")
    return content


class ArtifactFiles:
    """What the manifest of `folder` says of its files, and whether they are that.

    Raises SourceError for a manifest that is none, or was edited. Without `check` files are used
    as they are. Safe to use from several threads.
    """

    def __init__(self, folder: Path, check: bool = True) -> None:
        self.folder, self._check = folder, check
        self.manifest = read_object(folder / MANIFEST)
        self._hashes = _hashes(folder / MANIFEST, self.manifest) if self.checked else {}
        self._same: set[Path] = set()
        self._lock = threading.Lock()

    @property
    def checked(self) -> bool:
        """Whether files are compared with a manifest at all."""
        return self._check and bool(self.manifest)

    def require(self, path: Path) -> Path:
        """`path`, once its bytes are those of the manifest. Raises SourceError by its name."""
        if not self.checked or path in self._same:
            return path
        expected = self._hashes.get(path.relative_to(self.folder).as_posix())
        if expected is None and not path.exists():
            return path  # whoever wants it says that it is not there
        actual = f"sha256 {digest_of(path)[1]}" if path.is_file() else "no file"
        if expected is None or actual != f"sha256 {expected}":
            expected_text = f"sha256 {expected}" if expected else "no such file"
            raise SourceError(str(path), actual, f"{expected_text} as in the manifest", _CHANGED)
        with self._lock:
            self._same.add(path)
        return path

    def read(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files, checked; empty where the folder does without it."""
        return read_object(self.require(self.folder / name))

    @contextmanager
    def requiring(self, graphs: Iterable[Path]) -> Iterator[None]:
        """Check graphs, and their weights while the block loads them.

        Graphs are small and say what else is loaded, so they are hashed before. A graph cannot
        name weights outside its own folder; those that lie there and are listed are hashed on a
        thread of their own, on which the end of the block waits. A file that is not what it was
        is the error, also where loading it failed.
        """
        if not self.checked:
            yield
            return
        paths = [self.require(path) for path in graphs]
        homes = {path.parent for path in paths}
        weights = [
            path
            for name in sorted(self._hashes)
            if name.endswith(DATA_SUFFIXES) and (path := self.folder / name).parent in homes
        ]
        with ThreadPoolExecutor(1, "adaptrix-hashes") as pool:
            hashing = [pool.submit(self.require, path) for path in weights]
            try:
                yield
            finally:
                for hashed in hashing:
                    hashed.result()


def _hashes(path: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """File name -> sha256. Raises SourceError for a manifest that is not as it was written."""
    if CHECKSUM in manifest and manifest_text(manifest) != path.read_text(encoding="utf-8"):
        raise SourceError(
            str(path), f"not what its {CHECKSUM} says", "the manifest as it was written", _CHANGED
        )
    try:
        return {str(name): str(entry["sha256"]) for name, entry in manifest["outputs"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(
            str(path), f"no outputs ({error!r})", "the manifest of a build", "build again"
        ) from error
