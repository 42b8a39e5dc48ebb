"""A strict YAML reader for recipes: plain data only.

Stricter than `yaml.safe_load`: duplicate keys, aliases, tags and deep nesting are errors. Only
`true` and `false` are booleans, as in YAML 1.2, so `level: off` is the string "off"; dates are
strings, too.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from adaptrix_export.errors import RecipeError

MAX_DEPTH = 16
_CORE = "tag:yaml.org,2002:"
_SCALARS = tuple(_CORE + kind for kind in ("str", "int", "float", "bool", "null"))


class _Loader(yaml.SafeLoader):
    """Composes nodes; `_value` below turns them into data."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        if alias or self.depth == MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # so in types-PyYAML
            problem = "an alias" if alias else f"more than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# What a plain word is, if not a string: first characters and pattern, after YAML 1.2's core schema.
_WORDS = (
    ("bool", "tTfF", "true|True|TRUE|false|False|FALSE"),
    ("int", "-+0123456789", "[-+]?(0|[1-9][0-9]*)"),
    ("float", "-+.0123456789", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"),
    ("null", "~nN", "~|null|Null|NULL"),
)
_Loader.yaml_implicit_resolvers = {"": [(_CORE + "null", re.compile(""))]}
for _kind, _first, _pattern in _WORDS:
    _Loader.add_implicit_resolver(_CORE + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str, place: str) -> Any:
    """The data in `text`; `place` names it in errors. Raises RecipeError, with the line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _value(loader, node, place)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{place}:{mark.line + 1}" if mark and "\n" in text else place
        problem = error.problem or error.context or "damaged"
        raise RecipeError(where, problem, "plain YAML") from error
    except yaml.YAMLError as error:
        raise RecipeError(place, str(error), "plain YAML") from error
    except ValueError as error:  # `!!int x`, or more digits than Python converts
        raise RecipeError(place, "a number that cannot be read", "a plain number") from error


def _value(loader: _Loader, node: yaml.Node, place: str) -> Any:
    where = f"{place}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
        return _mapping(loader, node, place)
    if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
        return [_value(loader, item, place) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return loader.construct_object(node)
    raise RecipeError(where, f"the tag {node.tag}", "plain data", "remove the tag")


def _mapping(loader: _Loader, node: yaml.MappingNode, place: str) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{place}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(where, "a key that is not a word", "key: value")
        key = key_node.value  # as written, so that a key `on` or `1` is that word
        if key in document:
            raise RecipeError(where, f"the key {key!r} a second time", "each key once", "keep one")
        document[key] = _value(loader, value_node, place)
    return document
