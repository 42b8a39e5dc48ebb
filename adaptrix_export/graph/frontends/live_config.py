"""The transformers config of a plan's model."""

from __future__ import annotations

from typing import Any

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.arch.tasks import TWO_PARTS
from adaptrix_export.plan import Plan


def live_config(plan: Plan) -> Any:
    """A PretrainedConfig: the base's config.json with the plan's changes.

    Without a dtype: graphs are built in float32, whatever dtype the files store.
    """
    from transformers import AutoConfig

    config = {k: v for k, v in plan.base.config.items() if k not in ("dtype", "torch_dtype")}
    if plan.base.task not in TWO_PARTS:  # T5 scales by what its own file says of it
        config["tie_word_embeddings"] = bool(plan.base.tied)
    config.update(config_changes(plan))
    return AutoConfig.for_model(**config)
