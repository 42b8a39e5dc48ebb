"""A place in a model that an adapter changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A place that an adapter changes.

    `Site("model.layers", 7, "self_attn.q_proj")` is a module of one layer of a stack;
    `Site("", None, "lm_head")` is one outside any stack.
    """

    stack: str
    layer: int | None
    module: str

    @property
    def path(self) -> str:
        """The module path in the model, e.g. `model.layers.7.self_attn.q_proj`."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}.{self.module}"

    @property
    def order(self) -> tuple[str, int, str]:
        """Sort key: by stack, then by layer as a number (10 comes after 9), then by module."""
        return (self.stack, -1 if self.layer is None else self.layer, self.module)

    def __str__(self) -> str:
        return self.path
