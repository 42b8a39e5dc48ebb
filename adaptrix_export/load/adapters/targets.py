"""Which modules a PEFT config targets, by PEFT's own rule and without a model.

The rule is `check_target_module_exists` of peft.tuners.tuners_utils (0.21): `exclude_modules`, then
`modules_to_save`, then a regex or a list of endings, then the layer number. Patterns are untrusted
input, so each match has a time limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import regex

from adaptrix_export.load.adapters.folders import CONFIG
from adaptrix_export.load.adapters.patterns import search
from adaptrix_export.plan import Base

ALL_LINEAR = "all-linear"


def modules(base: Base) -> list[str]:
    """Paths of the modules that a tuner can act on: those whose weight has two or more
    dimensions."""
    stored = {name: base.tensors.get(home) for name, home in base.tied.items()}
    stored.update(base.tensors)
    return [
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and tensor is not None and len(tensor.shape) > 1
    ]


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT puts an adapter on the module `path`.

    `all-linear` depends on module classes, which headers do not have: then every path is a target.
    Raises AdapterError for an invalid pattern, and for one that takes too long.
    """
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str) and _matches(excluded, path, whole=True):
        return False
    if not isinstance(excluded, str) and _ends(path, excluded):
        return False
    for name in config.get("modules_to_save") or ():
        if _matches(rf"(^|.*\.){name}($|\..*)", path, whole=False):
            return False
    target_modules = config.get("target_modules")
    if isinstance(target_modules, str):
        return target_modules.lower() == ALL_LINEAR or _matches(target_modules, path, whole=True)
    if path in (target_modules or ()):
        return True
    return _ends(path, target_modules or ()) and _in_layers(config, path)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    """`layers_to_transform` and `layers_pattern`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    forms = [
        rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    for form in forms or [r".*?\.[^.]*\.(\d+)\."]:
        layer = _search(form, path)
        if layer is not None:
            return layer in (layers if isinstance(layers, list) else [layers])
    return False


def _search(pattern: str, path: str) -> int | None:
    match = search(CONFIG, regex.match, "%s", pattern, path)
    return int(match.group(1)) if match else None


def _ends(path: str, names: Any) -> bool:
    words = path.split(".")
    return any(".".join(words[start:]) in names for start in range(len(words)))


def _matches(pattern: str, path: str, whole: bool) -> bool:
    return bool(search(CONFIG, regex.fullmatch if whole else regex.match, "%s", pattern, path))
