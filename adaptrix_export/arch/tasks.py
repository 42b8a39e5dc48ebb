"""Chooses the task of a build, which decides the model's class, its heads and its tensor names.

Tensor names depend on the task: `BertModel` calls a layer `encoder.layer.0`,
`BertForSequenceClassification` calls it `bert.encoder.layer.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adaptrix_export.arch.families import (
    DECODER,
    ENCODER,
    ENCODER_DECODER,
    FAMILIES,
    LISTENER,
    family_of,
)
from adaptrix_export.arch.task_table import (
    AS_SAVED,
    CLASSIFIERS,
    FEATURES,
    GENERATION,
    LABELS,
    MASKED,
    SEQ2SEQ,
    SEQUENCES,
    SPEECH,
    TASKS,
    TEXT,
    TOKENS,
    TWO_PARTS,
    TaskKind,
)
from adaptrix_export.errors import AdapterError, UnsupportedError

# (model type, task) -> a trained layer before the classifier that PEFT does not save by default.
POOLERS = {
    ("bert", SEQUENCES): "bert.pooler.dense",
    ("albert", SEQUENCES): "albert.pooler",
    ("distilbert", SEQUENCES): "pre_classifier",
    ("deberta-v2", SEQUENCES): "pooler.dense",
    ("modernbert", SEQUENCES): "head.dense",
    ("modernbert", TOKENS): "head.dense",
    ("eurobert", SEQUENCES): "dense",
}
# Names of heads in transformers' classes, of any task.
KNOWN_HEADS = ("lm_head", "cls", "classifier", "score", "qa_outputs", "embed_out", "generator")
# Shape of a model -> its possible tasks. The first is the default for a checkpoint without a head:
# an encoder computes features, and a bare LlamaModel generates.
TASKS_OF = {
    DECODER: (GENERATION, FEATURES, SEQUENCES, TOKENS),
    ENCODER: (FEATURES, SEQUENCES, TOKENS),
    ENCODER_DECODER: (SEQ2SEQ,),
    LISTENER: (SPEECH,),
}
__all__ = [
    "CLASSIFIERS",
    "FEATURES",
    "GENERATION",
    "LABELS",
    "SEQ2SEQ",
    "SEQUENCES",
    "SPEECH",
    "TASKS",
    "TEXT",
    "TOKENS",
    "TWO_PARTS",
    "TaskKind",
    "choose_task",
    "class_name",
    "has_row",
]
_CLASS = re.compile(r"^(.*?)(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


def choose_task(
    requested: str, base: Mapping[str, Any], adapters: Iterable[Mapping[str, Any]]
) -> str:
    """The task: `requested`, else the adapters' task, else that of the base's saved class.

    `base` is the base's config.json, `adapters` are the adapters' adapter_config.json. Raises
    UnsupportedError for a task that the base has no class for, AdapterError for adapters that were
    trained for different tasks.
    """
    kind = str(base.get("model_type"))
    trained_tasks = {task for config in adapters if (task := _trained_task(config, base))}
    if len(trained_tasks) > 1 and requested == "auto":
        raise AdapterError(
            "adapters", f"trained for {' and '.join(sorted(trained_tasks))}", "one task",
            "build them one by one, or name the task",
        )  # fmt: skip
    if requested != "auto":
        task = requested
    else:
        task = trained_tasks.pop() if trained_tasks else _saved_task(base, kind)
    if not (has_row(base, task) or _has_class(base, task)):
        shape = family_of(kind).shape if _has_usual_names(base) else "model of transformers"
        raise UnsupportedError(
            f"task {task}", f"a base of type {kind}, an {shape}".replace("an d", "a d").replace(
                "an m", "a m"),
            " or ".join(_possible_tasks(base)), "name the task",
        )  # fmt: skip
    return task


def has_row(config: Mapping[str, Any], task: str) -> bool:
    """Whether `families.py` has the names of this model and task; otherwise they are read from the
    class (`arch/skeleton.py`)."""
    kind = str(config.get("model_type"))
    return _has_usual_names(config) and task in TASKS_OF[family_of(kind).shape]


def _has_usual_names(config: Mapping[str, Any]) -> bool:
    """Whether a type has a row, or is a text decoder with the default names and one stack."""
    kind = str(config.get("model_type"))
    if kind in FAMILIES:
        return True
    parts = [v for k, v in config.items() if k.endswith("_config") and isinstance(v, Mapping)]
    if config.get("is_encoder_decoder") or any("model_type" in part for part in parts):
        return False
    name = str((config.get("architectures") or [""])[0])
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    if not name.endswith(("Model", TASKS[SEQUENCES].suffix, TASKS[TOKENS].suffix)) and name:
        return False
    return _is_decoder(kind)


def _is_decoder(kind: str) -> bool:
    """Whether transformers has only decoder classes for a type."""
    from adaptrix_export.arch.classes import class_names

    other = (MASKED, SEQ2SEQ, "automatic-speech-recognition", "image-text-to-text")
    return bool(class_names(kind, GENERATION)) and not any(class_names(kind, t) for t in other)


def _has_class(config: Mapping[str, Any], task: str) -> bool:
    """Whether transformers has a class for the task; unknown types pass, `live_class` refuses
    them."""
    from adaptrix_export.arch.classes import live_class_name, tasks_of

    kind = str(config.get("model_type"))
    if task == GENERATION and family_of(kind).shape == ENCODER:
        return False  # a BertLMHeadModel reads what it is to predict
    return live_class_name(config, task) is not None or not tasks_of(kind)


def _possible_tasks(config: Mapping[str, Any]) -> tuple[str, ...]:
    from adaptrix_export.arch.classes import tasks_of

    kind = str(config.get("model_type"))
    rows = TASKS_OF[family_of(kind).shape] if _has_usual_names(config) else ()
    return (*rows, *(task for task in tasks_of(kind) if task not in rows))


def _trained_task(config: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The adapter's task by `task_type`, else by the class in `auto_mapping`, else None.

    CAUSAL_LM and SEQ_2_SEQ_LM are also used for speech and vision-language models: if the base has
    another class that generates, its task is returned.
    """
    named = config.get("task_type")
    if named:
        task = next((name for name, row in TASKS.items() if row.peft == named), None)
        if task is None:
            raise UnsupportedError(
                "adapter_config.json: task_type", str(named),
                ", ".join(row.peft for row in TASKS.values() if row.peft),
                "correct it there, or take it out and name the task",
            )  # fmt: skip
        listens = family_of(str(base.get("model_type"))).shape == LISTENER
        return task if _has_usual_names(base) and not listens else _resolve_task(task, base)
    wrapped = (config.get("auto_mapping") or {}).get("base_model_class")
    return _task_of_class(str(wrapped), base) if wrapped else None


def _resolve_task(task: str, base: Mapping[str, Any]) -> str:
    """The task of this base that corresponds to `task`, which PEFT has a word for."""
    from adaptrix_export.arch.classes import tasks_of

    kind = str(base.get("model_type"))
    saved, possible = _saved_task(base, kind), tasks_of(kind)
    for word in ("generates", "labels"):
        if getattr(TASKS[task], word):
            if getattr(TASKS[saved], word):
                return saved
            other = next((t for t in possible if getattr(TASKS[t], word)), task)
            return task if task in possible else other
    return task


def _saved_task(config: Mapping[str, Any], kind: str) -> str:
    names = config.get("architectures") or []
    task = _task_of_class(str(names[0]), config) if names else None
    if _has_usual_names(config):
        possible = TASKS_OF[family_of(kind).shape]
        if task == AS_SAVED and family_of(kind).shape == ENCODER_DECODER:
            return AS_SAVED  # half of one: T5EncoderModel
        return task if task in possible else possible[0]
    from adaptrix_export.arch.classes import tasks_of

    return task or next(iter(tasks_of(kind)[-1:]), FEATURES)


def _task_of_class(name: str, base: Mapping[str, Any]) -> str | None:
    """The task of a class, if it is a class of this base's type.

    The class of a larger model around this one, a vision-language model for example, has no task
    here.
    """
    kind = str(base.get("model_type"))
    own = AS_SAVED if [name] == list(base.get("architectures") or ())[:1] else None
    if not _has_usual_names(base):
        from adaptrix_export.arch.classes import task_of

        return task_of(kind, name) or own
    shape = family_of(kind).shape
    for task in (*CLASSIFIERS, GENERATION, *TWO_PARTS):
        if name.endswith(TASKS[task].suffix) and task in TASKS_OF[shape]:
            return task
    if shape == ENCODER and name.endswith("Model"):
        return FEATURES
    from adaptrix_export.arch.classes import task_of

    class_task = task_of(kind, name) or own
    return None if class_task in (GENERATION, FEATURES) else class_task


def class_name(config: Mapping[str, Any], task: str) -> str | None:
    """`architectures` of the same model for another task: LlamaForCausalLM -> LlamaFor...."""
    if not has_row(config, task):
        from adaptrix_export.arch.classes import live_class_name

        return live_class_name(config, task)
    names = config.get("architectures") or []
    stem = _CLASS.match(str(names[0])) if names else None
    return f"{stem[1]}{TASKS[task].suffix}" if stem else None
