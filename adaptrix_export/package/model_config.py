"""A config.json that transformers 4 and transformers 5 read alike.

transformers 5 renamed keys, and a reader of one generation ignores the other's in silence: 4.57
takes theta 10000 for any model whose theta stands in `rope_parameters` only. Both sets of names
are therefore written beside each other. Read off the `convert_rope_params_to_dict` methods of
transformers 5.23 and the config classes of 4.57.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from adaptrix_export.recipe.targets import Form, facts_of

# Same value, other name.
RENAMED = {"_sliding_window_pattern": "sliding_window_pattern"}

# Where transformers 4 keeps what transformers 5 has in a flat `rope_parameters`.
ROPE_NAMES = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
ROPE_NAMES_OF_TYPE = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}

# Where transformers 4 keeps theta when `rope_parameters` has one entry a layer type.
LAYER_THETA = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
LAYER_THETA_OF_TYPE = {
    name: {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    for name in ("modernbert", "modernbert-decoder")
}

# transformers 4 refuses a rope_scaling of these types with any other set of keys.
_LONGROPE_KEYS = ("type", "short_factor", "long_factor")
_FACTOR_KEYS = ("type", "factor")
SCALING_KEYS_OF_TYPE = {
    "phi3": _LONGROPE_KEYS,
    "phi4_multimodal": _LONGROPE_KEYS,
    "olmo": _FACTOR_KEYS,
    "olmo2": _FACTOR_KEYS,
    "fuyu": _FACTOR_KEYS,
    "chameleon": _FACTOR_KEYS,
}


def portable_config(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """`config` with the keys of both generations; keys that it has keep their values.

    The exception is `dtype` (a torch name, `float32`), which is set when given. Nested model
    configs (`text_config`) are treated the same way. The argument is not changed.
    """
    portable = _both_names(config, dtype)
    if dtype is not None:
        portable["dtype"] = portable["torch_dtype"] = dtype
    return portable


def lost_in_4(config: Mapping[str, Any]) -> list[str]:
    """The keys without which transformers 4 takes its own defaults, in silence."""
    nested = (value for value in config.values() if isinstance(value, Mapping))
    within = [key for part in nested if "model_type" in part for key in lost_in_4(part)]
    legacy = _legacy_rope(config)
    missing = [key for key, value in legacy.items() if value is not None and key not in config]
    return sorted({*missing, *within})


def portability_notes(target: str, config: Mapping[str, Any], portable: bool) -> tuple[str, ...]:
    """What a user of an older transformers should know of a checkpoint's config."""
    if portable or facts_of(target).form is not Form.CHECKPOINT:
        return ()
    lost = lost_in_4(config)
    if not lost:
        return ()
    return (
        f"transformers 4 finds no {', '.join(lost)} in this config.json and takes its defaults, "
        "which gives other logits; `portable: true` writes the names of both generations",
    )


def _both_names(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    portable: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and "model_type" in value
        portable[key] = _both_names(value, dtype) if nested else deepcopy(value)
    stated = portable.get("dtype") or portable.get("torch_dtype")
    if isinstance(stated, str):
        portable["dtype"] = dtype or portable.get("dtype") or stated
        portable["torch_dtype"] = dtype or portable.get("torch_dtype") or stated
    for new, old in RENAMED.items():
        if new in portable:
            portable.setdefault(old, portable[new])
    for key, value in _legacy_rope(portable).items():
        portable.setdefault(key, value)
    return portable


def _legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 would have written in place of `rope_parameters`."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        return {}
    kind = str(config.get("model_type", ""))
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        names = ROPE_NAMES_OF_TYPE.get(kind, ROPE_NAMES)
        legacy = {old: parameters[new] for new, old in names.items() if new in parameters}
        return {**legacy, "rope_scaling": _rope_scaling(parameters, kind)}
    legacy = {}
    for layer_type, old in LAYER_THETA_OF_TYPE.get(kind, LAYER_THETA).items():
        entry = parameters.get(layer_type)
        if isinstance(entry, Mapping) and "rope_theta" in entry:
            legacy[old] = entry["rope_theta"]
    # transformers 4 scales the full attention layers only, whatever else there is.
    full = parameters.get("full_attention")
    if isinstance(full, Mapping):
        legacy["rope_scaling"] = _rope_scaling(full, kind)
    return legacy


def _rope_scaling(parameters: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """The scaling part alone; None for plain rotary embeddings.

    It must say all that `rope_parameters` says, because transformers 5 prefers it where a file
    has both.
    """
    scaling = {k: deepcopy(v) for k, v in parameters.items() if k not in ROPE_NAMES}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default" and not scaling.keys() - {"rope_type", "type"}:
        return None
    keys = SCALING_KEYS_OF_TYPE.get(kind)
    if keys is None:
        return scaling
    scaling["type"] = rope_type
    return {key: scaling[key] for key in keys if key in scaling}
