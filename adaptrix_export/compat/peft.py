"""What PEFT keeps in modules that its documentation does not name."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def tuner_layers(model: Any) -> list[tuple[str, Any]]:
    """Path and module of every adapter layer that PEFT put into `model`.

    Seen in PEFT 0.20 and 0.21 (`BaseTunerLayer`). Without it an adapter's layer cannot be told from
    the model's own, and nothing can check that every stored tensor was placed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def merge_formulas() -> ModuleType:
    """PEFT's functions that combine task tensors: `prune`, `disjoint_merge` and their like.

    Seen in PEFT 0.20 and 0.21. Without it the oracle of a composition by PEFT's own method would
    compare with our reading of the formula, and not with PEFT's code.
    """
    from peft.utils import merge_utils

    return merge_utils
