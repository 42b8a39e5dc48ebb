"""Text files that a recipe or an option names."""

from __future__ import annotations

from pathlib import Path

from adaptrix_export.errors import RecipeError


def read_text(path: Path, key: str) -> str:
    """A UTF-8 text file of the user's, or RecipeError about the `key` that named it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(key, f"{path} ({error})", "a UTF-8 text file") from error
