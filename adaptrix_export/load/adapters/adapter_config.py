"""The adapter_config.json of an adapter that is not opened yet."""

from __future__ import annotations

from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.load.adapters.folders import CONFIG, nested_folder
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.source import resolve


def adapter_config(spec: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter, or nothing for a form without one.

    Nothing also for one that cannot be read: what is wrong is said where the adapter is opened.
    """
    try:
        source = resolve(spec)
        path = nested_folder(spec, source.folder)[0] / CONFIG
        return read_json(path) if path.is_file() else {}
    except SourceError:
        return {}
