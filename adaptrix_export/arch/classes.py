"""Looks up the transformers class of a model type and task, or the task of a class, in
transformers' auto mappings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrix_export.arch.task_table import AS_SAVED, FEATURES, GENERATION, TASKS
from adaptrix_export.compat.transformers import mapped_class_names
from adaptrix_export.errors import UnsupportedError

# A class may be in several mappings: Gemma3ForConditionalGeneration is also in that of causal
# models, and CLIPModel in that of bare ones. The most specific task is taken.
_LAST = (GENERATION, FEATURES, AS_SAVED)
_ORDER = (*(task for task in TASKS if task not in _LAST), GENERATION, FEATURES)


def class_names(kind: str, task: str) -> tuple[str, ...]:
    """Names of the classes for a model type and a task, the default one first."""
    return tuple(name for auto in TASKS[task].autos for name in mapped_class_names(auto, kind))


def task_of(kind: str, name: str) -> str | None:
    """The task of a class among the tasks of its model type; None if no row has the class."""
    return next((task for task in _ORDER if name in class_names(kind, task)), None)


def tasks_of(kind: str) -> tuple[str, ...]:
    """Every task that transformers has a class for, by model type."""
    return tuple(task for task in (*_ORDER,) if class_names(kind, task))


def live_class_name(config: Mapping[str, Any], task: str) -> str | None:
    """The name of a model's class for a task: that in `architectures` if it is for the task, else
    the default one; None if there is none."""
    saved = [str(name) for name in config.get("architectures") or ()][:1]
    if task == AS_SAVED:
        return saved[0] if saved else None
    names = class_names(str(config.get("model_type")), task)
    return next((name for name in saved if name in names), names[0] if names else None)


def live_class(place: str, config: Mapping[str, Any], task: str) -> Any:
    """The class. Raises UnsupportedError for custom code, for a model type that the installed
    transformers does not know, and for a task that the type has no class for."""
    import transformers

    kind, version = str(config.get("model_type")), transformers.__version__
    if kind not in transformers.CONFIG_MAPPING:
        custom = "auto_map" in config
        raise UnsupportedError(
            f"{place}: model type {kind!r}",
            "code of its own (auto_map), which is not run" if custom
            else f"not a type of transformers {version}",
            f"a type of transformers {version}",
            "convert it to a type of transformers" if custom else "install a newer transformers",
        )  # fmt: skip
    name = live_class_name(config, task)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None:
        raise UnsupportedError(
            f"{place}: task {task}", f"a base of type {kind}"
            + (f", saved as {name}" if name else ""),
            " or ".join(tasks_of(kind)) or "a class of transformers", "name the task",
        )  # fmt: skip
    return model_class
