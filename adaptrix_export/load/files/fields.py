"""Type checks of the fields of JSON input, made where the file is read.

Later code relies on these types. Fields that no table names are checked by the code that reads
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from adaptrix_export.errors import SourceError

LARGEST = 10**9  # of a size, a count or a token id
MOST = 50_000  # entries of a list or an object; a LoRA on each of 6,144 experts names 37,000
SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Kind:
    """A type of values: `words` describe it in errors, `fits` tests a value."""

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.words} or {other.words}", lambda v: self.fits(v) or other.fits(v))


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and isfinite(value))


def list_of(kind: Kind, most: int = MOST) -> Kind:
    return Kind(
        f"a list of ({kind.words}), at most {most}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(kind.fits, value)),
    )


def map_of(kind: Kind, most: int = MOST) -> Kind:
    return Kind(
        f"an object of ({kind.words}), at most {most}",
        lambda value: (
            isinstance(value, Mapping)
            and len(value) <= most
            and all(map(kind.fits, value.values()))
        ),
    )


NULL = Kind("null", lambda value: value is None)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a finite number", _is_number)
COUNT = Kind(
    f"a whole number from 0 to {LARGEST}",
    lambda value: type(value) is int and 0 <= value <= LARGEST,
)
SIZE = Kind(
    f"a whole number from 1 to {LARGEST}", lambda value: type(value) is int and 0 < value <= LARGEST
)
SIZE_OR_ZERO = Kind(
    f"a whole number from 0 to {LARGEST}",
    lambda value: type(value) is int and 0 <= value <= LARGEST,
)
WHOLE = Kind("a whole number", lambda value: type(value) is int and abs(value) <= LARGEST)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
LIST = Kind("a list", lambda value: isinstance(value, list))
TEXTS = list_of(TEXT)


def check_fields(place: str, document: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise SourceError for the first field whose value is not of its kind.

    Missing and null fields are accepted here; the code that needs them checks for them.
    """
    for key in sorted(kinds.keys() & document.keys()):
        value = document[key]
        if value is not None and not kinds[key].fits(value):
            raise SourceError(
                f"{place}: {key}",
                _shown(value),
                kinds[key].words,
                "correct the file or save it again",
            )


def _shown(value: Any) -> str:
    if isinstance(value, (list, Mapping)) and len(value) > SHOWN:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
