"""What a model is for: which class of transformers runs it, and which heads that class has.

The same checkpoint has other tensor names and another live model for another task: `BertModel`
calls a layer `encoder.layer.0`, `BertForSequenceClassification` calls it `bert.encoder.layer.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptrix_export.arch.families import DECODER, ENCODER, ENCODER_DECODER, family_of
from adaptrix_export.errors import AdapterError, UnsupportedError

GENERATION, FEATURES = "text-generation", "feature-extraction"
SEQUENCES, TOKENS = "text-classification", "token-classification"
SEQ2SEQ = "text2text-generation"


@dataclass(frozen=True)
class TaskKind:
    """One task. `auto` loads the live model, `suffix` ends its class name, `heads` are the modules
    that it has beside the body, `peft` is the `task_type` of adapters trained for it."""

    auto: str
    suffix: str
    heads: tuple[str, ...]
    peft: str


TASKS: dict[str, TaskKind] = {
    GENERATION: TaskKind("AutoModelForCausalLM", "ForCausalLM", ("lm_head",), "CAUSAL_LM"),
    FEATURES: TaskKind("AutoModel", "Model", (), "FEATURE_EXTRACTION"),
    SEQUENCES: TaskKind(
        "AutoModelForSequenceClassification", "ForSequenceClassification",
        ("classifier", "score", "pre_classifier", "head", "pooler", "dense"), "SEQ_CLS",
    ),
    TOKENS: TaskKind(
        "AutoModelForTokenClassification", "ForTokenClassification",
        ("classifier", "score", "head"), "TOKEN_CLS",
    ),
    SEQ2SEQ: TaskKind(
        "AutoModelForSeq2SeqLM", "ForConditionalGeneration", ("lm_head",), "SEQ_2_SEQ_LM"
    ),
}  # fmt: skip
CLASSIFIERS = (SEQUENCES, TOKENS)
# What makes the labels: a row for each.
LABELS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
# What a type classifies through, beside the head that PEFT saves of itself.
POOLERS = {
    ("bert", SEQUENCES): "bert.pooler.dense",
    ("albert", SEQUENCES): "albert.pooler",
    ("distilbert", SEQUENCES): "pre_classifier",
    ("deberta-v2", SEQUENCES): "pooler.dense",
    ("modernbert", SEQUENCES): "head.dense",
    ("modernbert", TOKENS): "head.dense",
    ("eurobert", SEQUENCES): "dense",
}
# Modules beside the body in some class of transformers, whatever the task at hand.
KNOWN_HEADS = ("lm_head", "cls", "classifier", "score", "qa_outputs", "embed_out", "generator")
# What the shape of a model can do, first what it does without a head and a word of anyone's: an
# encoder then makes features, and a bare LlamaModel is taken to generate.
TASKS_OF = {
    DECODER: (GENERATION, FEATURES, SEQUENCES, TOKENS),
    ENCODER: (FEATURES, SEQUENCES, TOKENS),
    ENCODER_DECODER: (SEQ2SEQ,),
}
_CLASS = re.compile(r"^(.*?)(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


def choose_task(asked: str, base: Mapping[str, Any], adapters: Iterable[Mapping[str, Any]]) -> str:
    """The task: as the recipe says, else as the adapters were trained, else as the base is saved.

    `base` is its config.json, `adapters` are their adapter_config.json. Raises UnsupportedError
    for a task that nothing here can run, AdapterError for adapters trained for different ones.
    """
    kind = str(base.get("model_type"))
    wanted = {task for config in adapters if (task := _trained_for(config, kind))}
    if len(wanted) > 1 and asked == "auto":
        raise AdapterError(
            "adapters", f"trained for {' and '.join(sorted(wanted))}", "one task",
            "build them one by one, or name the task",
        )  # fmt: skip
    if asked != "auto":
        task = asked
    else:
        task = wanted.pop() if wanted else _saved_as(base, kind)
    shape = family_of(kind).shape
    if task not in TASKS_OF[shape]:
        raise UnsupportedError(
            f"task {task}", f"a base of type {kind}, an {shape}".replace("an d", "a d"),
            " or ".join(TASKS_OF[shape]), "name the task",
        )  # fmt: skip
    return task


def _trained_for(config: Mapping[str, Any], kind: str) -> str | None:
    """By `task_type`, else by the class that PEFT noted when it was given none."""
    named = config.get("task_type")
    if named:
        task = next((name for name, row in TASKS.items() if row.peft == named), None)
        if task is None:
            raise UnsupportedError(
                "adapter_config.json: task_type", str(named),
                ", ".join(row.peft for row in TASKS.values()),
                "other tasks cannot be built yet; name the task if it is one of these",
            )  # fmt: skip
        return task
    wrapped = (config.get("auto_mapping") or {}).get("base_model_class")
    return _task_of_class(str(wrapped), kind) if wrapped else None


def _saved_as(config: Mapping[str, Any], kind: str) -> str:
    names = config.get("architectures") or []
    found = _task_of_class(str(names[0]), kind) if names else None
    possible = TASKS_OF[family_of(kind).shape]
    return found if found in possible else possible[0]


def _task_of_class(name: str, kind: str) -> str | None:
    for task in (*CLASSIFIERS, GENERATION, SEQ2SEQ):
        if name.endswith(TASKS[task].suffix):
            return task
    if family_of(kind).shape == ENCODER and name.endswith("Model"):
        return FEATURES
    return None


def class_name(config: Mapping[str, Any], task: str) -> str | None:
    """`architectures` of the same model for another task: LlamaForCausalLM -> LlamaFor...."""
    names = config.get("architectures") or []
    stem = _CLASS.match(str(names[0])) if names else None
    return f"{stem[1]}{TASKS[task].suffix}" if stem else None
