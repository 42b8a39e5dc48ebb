"""Where the originals of an artifact lie on this machine.

An artifact holds no path of the machine that built it. The machine remembers: a file in the user's
cache, by the hash of the artifact's manifest, names base and adapters by absolute path. What it
names is used only if its hashes are those of the manifest.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrix_export.prove.preflight.preflight import cache_folder
from adaptrix_export.save.hashes import hash_file

MANIFEST = "manifest.json"
_BASES = ("base", "original_base")


def remember(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Note where a recipe's base and adapters are; without a writable cache nothing is noted."""
    places: dict[str, Any] = {key: absolute(recipe[key]) for key in _BASES if recipe.get(key)}
    places["adapters"] = {a["name"]: absolute(a["source"]) for a in recipe["adapters"]}
    entry = _entry(folder)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=entry.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(places, file, sort_keys=True)
        os.replace(file.name, entry)
    except OSError:
        return


def recall(folder: Path) -> dict[str, Any]:
    """What `remember` noted of an artifact; nothing where it noted nothing that can be read."""
    try:
        places = json.loads(_entry(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return places if isinstance(places, dict) else {}


def found_again(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A manifest's recipe, its sources where this machine remembers them."""
    places = recall(folder)
    known = places.get("adapters")
    adapters = known if isinstance(known, dict) else {}
    changed = {key: places[key] for key in _BASES if key in recipe and places.get(key)}
    named = [{**a, "source": adapters.get(a["name"], a["source"])} for a in recipe["adapters"]]
    return {**recipe, **changed, "adapters": named}


def absolute(spec: str) -> str:
    """A source as it is found from any folder: a path in full, other forms as they are."""
    if spec.startswith(("hf:", "package:")):
        return spec
    return str(Path(os.path.abspath(Path(spec).expanduser())))


def _entry(folder: Path) -> Path:
    return cache_folder() / "originals" / f"{hash_file(folder / MANIFEST).sha256}.json"
