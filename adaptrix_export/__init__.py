"""A compiler that merges PEFT adapters into a base transformer and proves the result.

    from adaptrix_export import Recipe, build

    outcome = build(Recipe(base="./base", adapters=("./lora",), target="onnx", out="./merged"))

Importing the package imports nothing heavy; `build` and `Recipe` are fetched when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptrix_export.pipeline import build
    from adaptrix_export.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "build"]

_HOMES = {"build": "adaptrix_export.pipeline", "Recipe": "adaptrix_export.recipe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
