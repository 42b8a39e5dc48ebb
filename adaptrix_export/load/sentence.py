"""How a base pools the states of its tokens: what its sentence-transformers files say."""

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
    """A kind of pooling, or several joined by `+`.

    Raises SourceError for a base without the files, or with a kind that has no name here.
    """
    found = sorted(folder.glob("*_Pooling/config.json"))
    place = f"{folder.name}: pooling"
    if len(found) != 1:
        raise SourceError(place, f"{len(found)} folders *_Pooling", "one", _REMEDY)
    config = read_json(found[0])
    kinds = [kind for flag, kind in _FLAGS.items() if config.get(flag) is True]
    kinds = kinds or _named(config.get("pooling_mode"))
    known = set(_FLAGS.values())
    if not kinds or not set(kinds) <= known:
        told = "+".join(kinds) or "no pooling_mode"
        raise SourceError(
            f"{place}: {found[0].parent.name}", told, ", ".join(sorted(known)), _REMEDY
        )
    return "+".join(kinds)


def _named(mode: Any) -> list[str]:
    """`pooling_mode` as newer releases write it: a name, or a list of names."""
    names = mode if isinstance(mode, list) else [mode] if isinstance(mode, str) else []
    return [str(name) for name in names]
