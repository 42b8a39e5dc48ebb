"""The files that make an encoder a sentence encoder: how its token vectors become one vector.

sentence-transformers lists its modules in `modules.json`; the one at path "" is the transformer
itself, every other one has a folder with a config and perhaps weights (`1_Pooling`, `2_Dense`).
An artifact takes them along, so that the library loads it as it loads the base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.links import require_inside

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
PICKLE = "pytorch_model.bin"


def copy_sentence_files(folder: Path, stage: Path) -> int:
    """Copy modules.json and what it names from a base's folder; returns the number of files.

    A base without modules.json has nothing to copy. Raises SourceError for a list that leaves the
    folder or names what is not there, UnsupportedError for a module whose weights are a pickle.
    """
    listing = folder / MODULES
    if not listing.is_file():
        return 0
    files = [listing]
    files += [path for pattern in SETTINGS for path in sorted(folder.glob(pattern))]
    for place in _folders(listing):
        files += _files(folder / place)
    for path in files:
        require_inside(folder.name, folder, path)
        target = stage / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # through links, as the hub's cache has them
    return len(files)


def _folders(listing: Path) -> list[str]:
    """The folders of all modules but the transformer. One without a folder has no settings."""
    place = f"{listing.parent.name}/{MODULES}"
    try:
        modules: Any = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(place, f"cannot be read ({error})", "a list of modules") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise SourceError(place, "something else", "a list of modules")
    paths = [str(module.get("path") or "") for module in modules]
    for path in paths:
        parts = PurePosixPath(path).parts
        if path.startswith(("/", "\\")) or "\\" in path or ":" in path or ".." in parts:
            raise SourceError(place, f"path {path!r}", "a folder beside it")
    return [path for path in paths if path and (listing.parent / path).is_dir()]


def _files(module: Path) -> list[Path]:
    files = [path for path in sorted(module.rglob("*")) if path.is_file()]
    names = {path.name for path in files}
    if PICKLE in names and "model.safetensors" not in names:
        raise UnsupportedError(
            f"{module.name}/{PICKLE}", "a pickle, which runs code when it is loaded",
            "model.safetensors", "load and save the base once with sentence-transformers",
        )  # fmt: skip
    return [path for path in files if path.suffix in (".json", ".safetensors", ".txt")]
