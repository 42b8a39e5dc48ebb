"""What transformers renames, or does not offer by a public name.

What is patched while a model is traced is in `transformers_tracing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_NAMES = ("cache", "past_key_values")


@cache
def cache_name() -> str:
    """The name of the cache of keys and values: an argument of a model, a field of its answer.

    Seen in transformers 5.23 (`past_key_values`) and 5.24 (`cache`; the old name goes in 5.40), and
    read from the declaration of an answer in the one installed. Without it a model with `**kwargs`
    runs without its cache, and says nothing.

    Raises UnsupportedError when it is neither of the known ones.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from adaptrix_export.errors import UnsupportedError

    fields = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
    for name in _NAMES:
        if name in fields:
            return name
    raise UnsupportedError(
        "transformers", f"an answer with the fields {', '.join(fields)}",
        f"a cache among them, named {' or '.join(_NAMES)}",
        "install a version that this package supports",
    )  # fmt: skip


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache` as a keyword argument of a model: `model(input_ids=..., **cache_argument(cache))`.

    Seen in and Without it: as `cache_name`.
    """
    return {cache_name(): cache}


def cache_of(answer: Any) -> Any:
    """The cache in what a model answered.

    Seen in and Without it: as `cache_name`.
    """
    return getattr(answer, cache_name())


def mapped_class_names(auto: str, model_type: str) -> tuple[str, ...]:
    """Names of the classes that an auto class, by its name, has for a model type.

    Seen in transformers 5.23 and 5.24. Without it the names of a type's classes are known only by
    importing the classes.
    """
    import transformers

    names = getattr(transformers, auto)._model_mapping._model_mapping.get(model_type, ())
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def mapped_classes(auto: Any, config: Any) -> tuple[Any, ...]:
    """The classes that an auto class has for a config.

    Seen in transformers 5.23 and 5.24. Without it what a class can do is known only of a model that
    was built.
    """
    classes = auto._model_mapping[type(config)]
    return tuple(classes) if isinstance(classes, (tuple, list)) else (classes,)


def supports_sdpa(model_class: Any) -> bool:
    """Whether a model can compute attention by PyTorch's own function.

    Seen in transformers 5.23 and 5.24. Without it a model that cannot (Gemma 2 caps its scores,
    BLOOM biases them) is refused when it is built for a trace.
    """
    return bool(model_class._supports_sdpa)


def model_from_config(model_class: Any, config: Any, **options: Any) -> Any:
    """A model of a class that is no auto class, with random weights, dtype and attention chosen.

    Seen in transformers 5.23 and 5.24. Without it `dtype` and `attn_implementation` have to be
    written into the config, which a model shares with others.
    """
    return model_class._from_config(config, **options)


def use_eager_attention(config: Any) -> None:
    """Have models of this config compute attention step by step.

    Seen in transformers 5.23 and 5.24. Without it transformers chooses an attention by itself when
    a class is called with a config.
    """
    config._attn_implementation = "eager"


def optional_names(model: Any) -> tuple[str, ...]:
    """Patterns of parameters that a checkpoint may lack without a word from transformers.

    Seen in transformers 5.23 and 5.24. Without it a checkpoint that lacks them is refused here,
    though transformers loads it.
    """
    return tuple(model._keys_to_ignore_on_load_missing or ())


def without_initialization() -> Any:
    """A context in which models are built without drawing their weights.

    Seen in transformers 5.23 and 5.24. Without it the initialization of every class runs, on
    tensors of the meta device.
    """
    from transformers.initialization import no_init_weights

    return no_init_weights()


def renamed_key(
    stored: str,
    renames: Sequence[Any],
    converters: Sequence[Any],
    prefix: str,
    names: Mapping[str, Any],
) -> tuple[str, str | None]:
    """The live name for a tensor of a checkpoint, and the pattern of the conversion that its values
    go through, if they do.

    Seen in transformers 5.23 and 5.24. Without it checkpoints of older names are refused.
    """
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(
        stored, list(renames), list(converters), prefix or None,
        dict.fromkeys(names, 1) if prefix else None,
    )  # fmt: skip
    return str(name), pattern


def loading_rules(model: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What transformers does to a checkpoint's names, and to its values, when it loads `model`.

    Seen in transformers 5.23 and 5.24. Without it checkpoints of older names, and those that store
    experts one by one, are refused.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    return (
        tuple(rule for rule in rules if not isinstance(rule, WeightConverter)),
        tuple(rule for rule in rules if isinstance(rule, WeightConverter)),
    )


def checkpoint_rules(model_type: str) -> tuple[Any, ...]:
    """The conversion rules of a model type, empty for one that has none.

    Seen in transformers 5.23 and 5.24. Without it experts that a checkpoint stores one by one find
    no stacked parameter.
    """
    from transformers import conversion_mapping

    rules: Any = conversion_mapping.get_checkpoint_conversion_mapping(model_type)  # type: ignore[no-untyped-call]
    return tuple(rules or ())
