"""The changes to config.json that a plan requires."""

from __future__ import annotations

from typing import Any

from adaptrix_export.arch.tasks import LABELS, TASKS, class_name
from adaptrix_export.plan import Plan


def config_changes(plan: Plan) -> dict[str, Any]:
    """The keys of config.json that differ between the merged model and the base."""
    changed = dict(plan.base.config_changes)
    if plan.untied():
        changed["tie_word_embeddings"] = False
    embedding = plan.changes().get(f"{plan.base.architecture.family.embedding}.weight")
    if embedding and embedding.shape[0] != plan.base.architecture.vocab_size:
        changed["vocab_size"] = embedding.shape[0]
    return changed | _head_changes(plan)


def _head_changes(plan: Plan) -> dict[str, Any]:
    """For a classifier that the adapter ships: the model's class, and a label for each row."""
    base = plan.base
    if not TASKS[base.task].labels:
        return {}
    changed: dict[str, Any] = {}
    name = class_name(base.config, base.task)
    if name and [name] != base.config.get("architectures"):
        changed["architectures"] = [name]
    heads = [c for n, c in plan.changes().items() if n in LABELS]
    labels = heads[0].shape[0] if heads else 0
    if labels and labels != len(base.config.get("id2label") or (0, 1)):
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        changed["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return changed
