"""Links in the folder of a base or an adapter may not lead out of it.

Files of the folder are copied into artifacts, and a link named `vocab.txt` may lead to any file
that the user can read. The hub's cache is a folder of links as well: from a snapshot into the blobs
of the same repository, which are as much part of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adaptrix_export.errors import SourceError

# Endings of whatever is read or copied; other links are left alone, as is what they lead to.
_READ = (
    ".json", ".safetensors", ".gguf", ".bin", ".pt", ".txt", ".model", ".jinja", ".tiktoken",
    ".npz",
)  # fmt: skip
_FOLDER_OF_INTEREST = ("adapter_config.json", "config.json")
SNAPSHOTS, BLOBS = "snapshots", "blobs"


def check_links(place: str, folder: Path) -> None:
    """Raise SourceError for a link to outside of `folder`, there or in a folder of it."""
    root = os.path.realpath(folder)
    for path in _links(folder):
        require_inside(place, root, path)


def require_inside(place: str, folder: Path | str, path: Path) -> None:
    """Raise SourceError unless `path`, all links followed, lies in `folder` or its hub blobs."""
    root, target = os.path.realpath(folder), os.path.realpath(path)
    homes = [root, *_blobs(Path(root))]
    if not any(os.path.commonpath((home, target)) == home for home in homes):
        raise SourceError(
            f"{place}: {path.name}", f"a link to {target}", "a file of this folder",
            "put the file itself there, or name the folder that it is in",
        )  # fmt: skip


def _links(folder: Path, depth: int = 1) -> Iterator[Path]:
    """Links to what may be read: in the folder, and in the folders that lie in it."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_symlink():
                if path.suffix in _READ or any((path / n).exists() for n in _FOLDER_OF_INTEREST):
                    yield path
            elif depth and entry.is_dir():
                yield from _links(path, depth - 1)


def _blobs(root: Path) -> Iterator[str]:
    """`models--org--name/blobs` for a folder in `models--org--name/snapshots/COMMIT`."""
    for folder in (root, *root.parents):
        if folder.parent.name == SNAPSHOTS:
            yield str(folder.parent.parent / BLOBS)
