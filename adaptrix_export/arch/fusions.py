"""Reads from transformers' conversion rules how it stacks experts that checkpoints store singly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from adaptrix_export.compat.transformers import checkpoint_rules

_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight$")
_PARAMETER = re.compile(r"experts\.(\w+)$")


def stacks_of(rule: Any) -> tuple[str, tuple[str, ...]] | None:
    """(stacked parameter, matrices of one expert in the order of their rows) of a conversion rule
    that only stacks experts; None for other rules."""
    steps = [type(step).__name__ for step in rule.operations]
    dims = [getattr(step, "dim", None) for step in rule.operations]
    if (steps, dims) not in ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"],
                                                          [0, 1])):  # fmt: skip
        return None
    parts = [_EXPERT.search(pattern) for pattern in rule.source_patterns]
    targets = [_PARAMETER.search(pattern) for pattern in rule.target_patterns]
    if len(targets) != 1 or targets[0] is None or not all(parts):
        return None
    return targets[0][1], tuple(part[1] for part in parts if part)


@cache
def stacked_parameters(model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Stacked parameter -> matrices of one expert, in the order of the live module's parameters;
    empty for a type without such rules."""
    parameters = {}
    for rule in checkpoint_rules(model_type):
        stack = stacks_of(rule) if hasattr(rule, "operations") else None
        if stack is not None:
            parameters[stack[0]] = stack[1]
    return parameters
