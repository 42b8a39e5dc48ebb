"""Which kind of module a live layer is, by the classes that PyTorch and transformers have."""

from __future__ import annotations

from typing import Any


def plain_kind(module: Any) -> str:
    """The class that says how a weight is stored: a model's own Linear or Embedding, which only
    does something more with it, is one."""
    names = [c.__name__ for c in type(module).__mro__]
    return next((name for name in ("Linear", "Embedding") if name in names[1:]), names[0])
