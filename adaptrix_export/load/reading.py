"""User options for reading adapter files."""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.errors import RecipeError

# The scale of a module of an original Adaptrix folder: from its numbers, as stored, or none.
ADAPTRIX_SCALINGS = ("alpha_over_rank", "stored", "one")


@dataclass(frozen=True)
class Reading:
    """`allow_pickle` lets adapter_model.bin be read (nothing in it is run even then)."""

    allow_pickle: bool = False
    adaptrix_scaling: str = "alpha_over_rank"

    def __post_init__(self) -> None:
        if self.adaptrix_scaling not in ADAPTRIX_SCALINGS:
            raise RecipeError(
                "adaptrix_scaling", repr(self.adaptrix_scaling),
                f"one of {', '.join(ADAPTRIX_SCALINGS)}",
            )  # fmt: skip


DEFAULT = Reading()
