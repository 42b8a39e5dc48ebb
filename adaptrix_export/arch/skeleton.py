"""A model of transformers without its weights: what its own class says of names and shapes.

Built on the meta device, which takes no memory. For every type that `families.py` has no row for,
and for every task beyond those that its rows are about: nothing here needs to know the type.
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

    `shapes` are those of its parameters and saved buffers; `tied` maps a parameter to the one whose
    values it shares; `embeddings` and `turned` are paths of modules that are looked up, and of
    those that store (in, out); `optional` are patterns of what may be missing from the files.
    `renames` and `converters` are transformers' own, for the names in the files.
    """

    class_name: str
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    embeddings: tuple[str, ...]
    turned: tuple[str, ...]
    embedding: str
    head: str
    text: Mapping[str, Any]  # the sizes of its text part, or of the whole
    optional: tuple[str, ...] = ()
    renames: tuple[Any, ...] = field(default=(), repr=False)
    converters: tuple[Any, ...] = field(default=(), repr=False)

    def live_name(self, stored: str) -> tuple[str, str | None]:
        """The live name for a tensor of the files, and the pattern of the conversion that its
        values go through, if they do."""
        return renamed_key(stored, self.renames, self.converters, self.prefix, self.shapes)

    def is_optional(self, name: str) -> bool:
        """Whether transformers says nothing when the files lack this name."""
        return any(re.search(pattern, name) for pattern in self.optional)


def skeleton_of(place: str, folder: Path, config: Mapping[str, Any], task: str) -> Skeleton:
    """The skeleton of the model that the checkpoint in `folder` is for `task`.

    Raises UnsupportedError for what transformers has no class for, SourceError for a config that
    its class does not take.
    """
    import transformers

    found = live_class(place, config, task)
    try:
        read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        raise SourceError(
            f"{place}: config.json", f"not what transformers takes ({error})", "a model's config",
            "save the model again with this transformers",
        ) from error  # fmt: skip
    return read_skeleton(built(place, found, read))


def built(place: str, found: Any, config: Any) -> Any:
    """A model of the class on the meta device."""
    import torch

    use_eager_attention(config)
    try:
        with torch.device("meta"), without_initialization():
            return found(config)
    except (ValueError, TypeError, NotImplementedError, AttributeError, ImportError) as error:
        raise UnsupportedError(
            f"{place}: {found.__name__}", f"cannot be built from its config ({error})",
            "a model that transformers builds", "save the model again with this transformers",
        ) from error  # fmt: skip


def read_skeleton(model: Any) -> Skeleton:
    """What a model (on any device) says of itself."""
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
        embedding=_place(modules, model, "get_input_embeddings"),
        head=_place(modules, model, "get_output_embeddings"),
        text=(text or model.config).to_dict(),
        optional=optional_names(model),
        renames=renames,
        converters=converters,
    )


def _place(modules: Mapping[str, Any], model: Any, getter: str) -> str:
    """The path of the module that the getter gives, or nothing: not every model has one."""
    try:
        wanted = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return ""
    return next((name for name, module in modules.items() if module is wanted), "")
