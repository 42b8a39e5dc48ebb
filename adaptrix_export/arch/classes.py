"""The class of transformers that runs a model: by its type and task, or by the name it was saved
with; and the task that a class is for. Read from transformers' own auto mappings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrix_export.arch.task_table import AS_SAVED, FEATURES, GENERATION, TASKS
from adaptrix_export.compat.transformers import mapped_class_names
from adaptrix_export.errors import UnsupportedError

# A class may stand in several mappings: Gemma3ForConditionalGeneration in that of causal models,
# too, and CLIPModel in that of bare ones. The task that says most is taken.
_LAST = (GENERATION, FEATURES, AS_SAVED)
_ORDER = (*(task for task in TASKS if task not in _LAST), GENERATION, FEATURES)


def class_names(kind: str, task: str) -> tuple[str, ...]:
    """The names of the classes that run a model type for a task, the usual one first."""
    return tuple(name for auto in TASKS[task].autos for name in mapped_class_names(auto, kind))


def task_of(kind: str, name: str) -> str | None:
    """The task of a class, among those of its model type; None where no row has it."""
    return next((task for task in _ORDER if name in class_names(kind, task)), None)


def tasks_of(kind: str) -> tuple[str, ...]:
    """Every task that transformers has a class for, by model type."""
    return tuple(task for task in (*_ORDER,) if class_names(kind, task))


def live_class_name(config: Mapping[str, Any], task: str) -> str | None:
    """The name of the class that runs a model for a task: as it was saved if that class is for
    the task, else the usual one; None where there is none."""
    saved = [str(name) for name in config.get("architectures") or ()][:1]
    if task == AS_SAVED:
        return saved[0] if saved else None
    names = class_names(str(config.get("model_type")), task)
    return next((name for name in saved if name in names), names[0] if names else None)


def live_class(place: str, config: Mapping[str, Any], task: str) -> Any:
    """The class itself. Raises UnsupportedError for custom code, for a model type that this
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
    found = getattr(transformers, name, None) if name else None
    if found is None:
        raise UnsupportedError(
            f"{place}: task {task}", f"a base of type {kind}"
            + (f", saved as {name}" if name else ""),
            " or ".join(tasks_of(kind)) or "a class of transformers", "name the task",
        )  # fmt: skip
    return found
