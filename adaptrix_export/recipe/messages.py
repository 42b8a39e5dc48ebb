"""Converts pydantic's validation errors into RecipeErrors: place, found, expected, remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from adaptrix_export.errors import RecipeError, did_you_mean

Location = Sequence["int | str"]


def refusal(found: str, expected: str, remedy: str = "", key: str = "") -> PydanticCustomError:
    """The error that validators of recipes raise, for `misuse`. `key`: the key, if not this one."""
    parts = {"found": found, "expected": expected, "remedy": remedy, "key": key}
    return PydanticCustomError("recipe", "{found}", parts)


def misuse(
    root: type[BaseModel],
    details: Iterable[Mapping[str, Any]],
    place: str,
    flags: Mapping[str, str],
) -> RecipeError:
    """The RecipeError for the first of pydantic's `details`, unknown keys before missing ones.

    `place` names the document; `flags` maps dotted keys to the flags that set them.
    """
    detail = min(details, key=lambda d: d["type"] != "extra_forbidden")
    found, expected, remedy = _explain(root, detail)
    parts = [str(part) for part in detail["loc"]] or [str(detail.get("ctx", {}).get("key", ""))]
    keys = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    origin = next((flags[key] for key in keys if key in flags), None)
    return RecipeError(origin or f"{place}: {keys[0]}", found, expected, remedy)


def _explain(root: type[BaseModel], detail: Mapping[str, Any]) -> tuple[str, str, str]:
    """(found, expected, remedy) for one of pydantic's errors."""
    kind, context, location = detail["type"], detail.get("ctx", {}), detail["loc"]
    if kind == "recipe":
        return context["found"], context["expected"], context["remedy"]
    if kind == "extra_forbidden":
        return _unknown_key(root, location)
    if kind == "missing":
        *parents, key = location
        description = _section(root, parents).model_fields[key].description or "a value"
        needed = description[0].lower() + description[1:].rstrip(".")
        flag = "" if parents else f" or give --{key.removesuffix('s')}"
        return "missing", needed, f"add `{key}:` to the recipe{flag}"
    if kind == "enum":
        words = re.findall(r"'([^']+)'", context["expected"])
        return shown(detail["input"]), one_of(words), did_you_mean(str(detail["input"]), words)
    if kind == "model_type":
        keys = ", ".join(_section(root, location).model_fields)
        return shown(detail["input"]), f"the keys {keys}", ""
    if kind == "too_short":
        return shown(detail["input"]), f"at least {context['min_length']}", ""
    expected = re.sub(r"^Input should be ", "", detail["msg"])
    return shown(detail["input"]), expected[0].lower() + expected[1:], ""


def _unknown_key(root: type[BaseModel], location: Location) -> tuple[str, str, str]:
    *parents, key = location
    if not parents and key == "adapter":
        return "adapter beside adapters", "one of the two", "put it into `adapters`"
    known = list(_section(root, parents).model_fields)
    return "unknown key", one_of(known), did_you_mean(str(key), known)


def _section(root: type[BaseModel], location: Location) -> type[BaseModel]:
    """The pydantic model of a location in the document."""
    section = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        section = next((a for a in inner if issubclass(a, BaseModel)), section)
    return section


def one_of(words: Iterable[object]) -> str:
    """`one of a, b`, or just `a`."""
    names = [str(word) for word in words]
    return names[0] if len(names) == 1 else "one of " + ", ".join(names)


def shown(value: object) -> str:
    """A short text for a value in an error."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "keys and values"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
