"""The pooling of a base, read from its sentence-transformers files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.tensors import read_json

AUTO = "auto"
# The flags of 1_Pooling/config.json, in the order in which the library joins their vectors.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_REMEDY = "name the pooling: mean, cls, lasttoken, max, mean_sqrt_len or weightedmean"


def saved_pooling(folder: Path) -> str:
    """The name of a pooling, or several joined by `+`.

    Raises SourceError for a base without these files, or with an unknown pooling.
    """
    configs = sorted(folder.glob("*_Pooling/config.json"))
    place = f"{folder.name}: pooling"
    if len(configs) != 1:
        raise SourceError(place, f"{len(configs)} folders *_Pooling", "one", _REMEDY)
    config = read_json(configs[0])
    kinds = [kind for flag, kind in _FLAGS.items() if config.get(flag) is True]
    kinds = kinds or _named(config.get("pooling_mode"))
    known = set(_FLAGS.values())
    if not kinds or not set(kinds) <= known:
        stated = "+".join(kinds) or "no pooling_mode"
        raise SourceError(
            f"{place}: {configs[0].parent.name}", stated, ", ".join(sorted(known)), _REMEDY
        )
    return "+".join(kinds)


def _named(mode: Any) -> list[str]:
    """`pooling_mode` as newer releases write it: a name, or a list of names."""
    names = mode if isinstance(mode, list) else [mode] if isinstance(mode, str) else []
    return [str(name) for name in names]
