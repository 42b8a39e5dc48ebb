"""Parses the target layers of a redistribution, in a recipe or `--layers`."""

from __future__ import annotations

from adaptrix_export.errors import RecipeError

AUTO, SEARCH = "auto", "search"
Layers = str | int | tuple[int, ...]


def parse_layers(text: str) -> Layers:
    """`auto`, `search`, `5` (a count) or `7,15,22` (a list; `7,` is a list of one)."""
    word = text.strip()
    if word in (AUTO, SEARCH):
        return word
    parts = [part.strip() for part in word.split(",")]
    listed = parts[:-1] if len(parts) > 1 and not parts[-1] else parts
    if not all(part.isdecimal() for part in listed):
        raise _invalid_layers(text)
    numbers = tuple(int(part) for part in listed)
    return numbers[0] if len(parts) == 1 else numbers


def check_layers(layers: Layers) -> Layers:
    """`layers`, or RecipeError for a value that is invalid for every model."""
    if isinstance(layers, str):
        if layers not in (AUTO, SEARCH):
            raise _invalid_layers(layers)
    elif isinstance(layers, int):
        if layers < 1:
            raise RecipeError("layers", str(layers), "at least one layer")
    elif not layers:
        raise RecipeError("layers", "an empty list", "at least one layer")
    elif len(set(layers)) != len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise RecipeError("layers", f"layer {twice} twice", "each layer once")
    return layers


def _invalid_layers(text: str) -> RecipeError:
    return RecipeError("layers", repr(text), "auto, search, a number, or numbers such as 7,15,22")
