"""Removes absolute paths from published files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any


def without_machine_paths(value: Any) -> Any:
    """`value` with every absolute path replaced by `path:<last part>`."""
    if isinstance(value, Mapping):
        return {str(k): without_machine_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(v) for v in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    if value.startswith(("/", "~")) or windows.is_absolute():
        return f"path:{windows.name}"  # splits at both kinds of slash
    return value
