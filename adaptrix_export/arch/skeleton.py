"""Names and shapes of a transformers model, read from an instance on the meta device.

The meta device takes no memory for weights. Used for model types without a row in `families.py`,
and for tasks that its rows do not cover; nothing here depends on the type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptrix_export.arch.classes import live_class
from adaptrix_export.compat.transformers import (
    loading_rules,
    optional_names,
    renamed_key,
    use_eager_attention,
    without_initialization,
)
from adaptrix_export.errors import SourceError, UnsupportedError


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a live model.

    `shapes`: of its parameters and saved buffers; `tied`: parameter -> the parameter that it
    shares; `embeddings`: paths of Embedding modules; `turned`: paths of modules that store (in,
    out); `optional`: patterns of tensors that the files may lack. `renames` and `converters` are
    transformers' rules for the names in the files.
    """

    class_name: str
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    embeddings: tuple[str, ...]
    turned: tuple[str, ...]
    embedding: str
    head: str
    text: Mapping[str, Any]  # the config of its text part, or of the whole model
    optional: tuple[str, ...] = ()
    renames: tuple[Any, ...] = field(default=(), repr=False)
    converters: tuple[Any, ...] = field(default=(), repr=False)

    def live_name(self, stored: str) -> tuple[str, str | None]:
        """The live name of a tensor of the files, and the pattern of the conversion rule that
        changes its values, if one does."""
        return renamed_key(stored, self.renames, self.converters, self.prefix, self.shapes)

    def is_optional(self, name: str) -> bool:
        """Whether transformers accepts files that lack this name without a warning."""
        return any(re.search(pattern, name) for pattern in self.optional)


def skeleton_of(place: str, folder: Path, config: Mapping[str, Any], task: str) -> Skeleton:
    """The skeleton of the checkpoint in `folder`, as a model for `task`.

    Raises UnsupportedError if transformers has no class for it, SourceError for a config that its
    class does not accept.
    """
    import transformers

    model_class = live_class(place, config, task)
    try:
        model_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        raise SourceError(
            f"{place}: config.json", f"not what transformers takes ({error})", "a model's config",
            "save the model again with this transformers",
        ) from error  # fmt: skip
    return read_skeleton(build_on_meta(place, model_class, model_config))


def build_on_meta(place: str, model_class: Any, config: Any) -> Any:
    """A model of the class on the meta device."""
    import torch

    use_eager_attention(config)
    try:
        with torch.device("meta"), without_initialization():
            return model_class(config)
    except (ValueError, TypeError, NotImplementedError, AttributeError, ImportError) as error:
        raise UnsupportedError(
            f"{place}: {model_class.__name__}", f"cannot be built from its config ({error})",
            "a model that transformers builds", "save the model again with this transformers",
        ) from error  # fmt: skip


def read_skeleton(model: Any) -> Skeleton:
    """The skeleton of a model on any device."""
    from torch import nn

    modules = dict(model.named_modules())
    renames, converters = loading_rules(model)
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    return Skeleton(
        class_name=type(model).__name__,
        prefix=model.base_model_prefix or "",
        shapes={name: tuple(value.shape) for name, value in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys or {}),
        embeddings=tuple(n for n, m in modules.items() if isinstance(m, nn.Embedding)),
        turned=tuple(n for n, m in modules.items() if type(m).__name__ == "Conv1D"),
        embedding=_module_path(modules, model, "get_input_embeddings"),
        head=_module_path(modules, model, "get_output_embeddings"),
        text=(text or model.config).to_dict(),
        optional=optional_names(model),
        renames=renames,
        converters=converters,
    )


def _module_path(modules: Mapping[str, Any], model: Any, getter: str) -> str:
    """The path of the module that the getter returns; empty if the model has none."""
    try:
        target = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return ""
    return next((name for name, module in modules.items() if module is target), "")
