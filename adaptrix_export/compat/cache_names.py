"""What transformers calls the cache of keys and values: an argument and a field of the answer.

`past_key_values` up to 5.23, `cache` from 5.24 on; the old name goes in 5.40. Under the wrong one a
model with `**kwargs` runs without its cache, and says nothing.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

_NAMES = ("cache", "past_key_values")


@cache
def cache_name() -> str:
    """The name in the transformers installed, read from its own declaration of an answer.

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
    """`cache` as a keyword argument of a model: `model(input_ids=..., **cache_argument(cache))`."""
    return {cache_name(): cache}


def cache_of(answer: Any) -> Any:
    """The cache in what a model answered."""
    return getattr(answer, cache_name())
