"""What a request may hold: token ids, masks, counts and weights, checked before anything runs.

ONNX Runtime takes a negative id for a row from the end of the embedding, and says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError

Ids = NDArray[np.int64]
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 60  # characters of a value in an error


def shown(value: Any) -> str:
    """A value for an error, cut short."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int. Raises SourceError for what is none, or is below `least`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral) or value < least:
        raise SourceError(name, shown(value), f"a whole number of at least {least}")
    return int(value)


def number(name: str, value: Any) -> float:
    """`value` as a float32 can hold it. Raises SourceError for what is none, or not finite."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise SourceError(name, shown(value), "a number")
    try:
        converted = float(value)
    except OverflowError:
        converted = float("inf")
    if not abs(converted) <= LARGEST:  # nor is NaN
        raise SourceError(name, shown(value), "a finite number in 32 bits")
    return converted


def text(name: str, value: Any) -> str:
    """A text that is not empty. Raises SourceError for anything else."""
    if not isinstance(value, str):
        raise SourceError(name, shown(value), "some text")
    if not value:
        raise SourceError(name, "empty", "some text")
    return value


def path_of(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise SourceError(name, shown(value), "a path")
    return Path(value)


def token_ids(name: str, values: Any, vocabulary: int | None, dimensions: int = 1) -> Ids:
    """Token ids with one axis, or two for a batch.

    Raises SourceError for ragged rows, values that are no whole numbers, and ids outside of the
    vocabulary; None stands for one that the graph does not say.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:  # ragged rows
        raise SourceError(name, str(error), "rows of one length") from error
    if array.size == 0 and array.ndim == dimensions:
        array = array.astype(np.int64)  # an empty list is one of floats to numpy
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise SourceError(
            name, f"{array.dtype} of shape {list(array.shape)}",
            "whole numbers, " + ("one row" if dimensions == 1 else "one row for each of a batch"),
        )  # fmt: skip
    if array.size:
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= (2**63 if vocabulary is None else vocabulary):
            most_allowed = "" if vocabulary is None else f" to {vocabulary - 1}"
            wrong = least if least < 0 else most
            raise SourceError(name, f"token id {wrong}", f"ids from 0{most_allowed}")
    return array.astype(np.int64)


def attention_mask(mask: Any, ids: Ids) -> Ids:
    """A mask of the shape of `ids`. Raises SourceError for other shapes and values."""
    values = np.asarray(mask)
    if values.shape != ids.shape or values.dtype.kind not in "iub":
        raise SourceError(
            "attention_mask", f"{values.dtype} of shape {list(values.shape)}",
            f"whole numbers of shape {list(ids.shape)}",
        )  # fmt: skip
    if values.size and not np.isin(values, (0, 1)).all():
        raise SourceError("attention_mask", f"values up to {values.max()}", "0 and 1")
    return values.astype(np.int64)


def stop_ids(stop: Any) -> frozenset[int]:
    """Ids that end an answer."""
    if not isinstance(stop, Collection) or isinstance(stop, (str, bytes)):
        raise SourceError("stop", shown(stop), "token ids")
    return frozenset(whole_number("stop", value) for value in stop)


def prompt_rows(rows: Any, vocabulary: int | None, context: int | None) -> list[Sequence[int]]:
    """The prompts of a batch. Raises SourceError for none, an empty one or one that is too long."""
    if not isinstance(rows, (Sequence, np.ndarray)) or isinstance(rows, (str, bytes)):
        raise SourceError("prompts", shown(rows), "rows of token ids")
    if not len(rows):
        raise SourceError("prompts", "none", "at least one")
    checked: list[Sequence[int]] = []
    for row in rows:
        ids = token_ids("prompt", row, vocabulary)
        if not len(ids):
            raise SourceError("prompt", "no tokens", "at least one")
        fits_context("prompt", len(ids), context)
        checked.append(ids.tolist())
    return checked


def fits_context(name: str, tokens: int, context: int | None) -> None:
    if context is not None and tokens > context:
        raise SourceError(name, f"{tokens} tokens", f"at most {context}", "shorten it")
