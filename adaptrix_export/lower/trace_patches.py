"""What transformers 5.23 does that cannot be traced as it is, done otherwise while a trace runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from adaptrix_export.load.task import GENERATION

# The kernel for grouped products wants bfloat16 of tensors without values; the fallback computes
# the same and has a translation to ONNX.
_NEVER_GROUPED = "transformers.integrations.moe._can_use_grouped_mm"


@contextmanager
def traceable(task: str) -> Iterator[None]:
    """The patches, for as long as the context lives."""
    from transformers.masking_utils import AttentionMaskInterface

    masks: dict[str, Any] = AttentionMaskInterface._global_mapping
    counted = {name: _by_tokens(masks[name]) for name in ("sdpa", "eager")}
    with (
        patch(_NEVER_GROUPED, lambda *_: False),
        patch.dict(masks, counted if task == GENERATION else {}),
    ):
        yield


def _by_tokens(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """`make_mask`, with a sliding window that counts the tokens of a row and not its places.

    The two differ where pads lie between tokens, as they do after a batch padded on the right has
    been continued; the cache then holds pads that no window should be spent on. An attention in
    chunks has a count of its own and stays as it is.
    """

    def masked(
        *,
        mask_function: Callable[..., Any],
        attention_mask: Any = None,
        local_size: int | None = None,
        config: Any = None,
        **options: Any,
    ) -> Any:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        if attention_mask is not None and local_size is not None and not chunked:
            mask_function = _at_tokens(mask_function, attention_mask.cumsum(1))
        return make_mask(
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
            config=config, **options,
        )  # fmt: skip

    return masked


def _at_tokens(mask_function: Callable[..., Any], places: Any) -> Callable[..., Any]:
    """`mask_function` asked about `places` (rows, length) instead of indices."""

    def asked(row: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(row, head, places[row, query], places[row, key])

    return asked
