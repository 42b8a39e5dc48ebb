"""Patches of transformers that are active while a model is traced.

Most of them are about padding. A cache here keeps the pads of a batch that was padded on the right
and then continued, so a sliding window or a distance bias that counts cache positions instead of
tokens would count the pads, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from adaptrix_export.compat.transformers import cache_name

# The grouped matrix product wants bfloat16 for fake tensors; the fallback computes the same and can
# be translated to ONNX.
_NEVER_GROUPED = "transformers.integrations.moe._can_use_grouped_mm"


@contextmanager
def traceable(generation: bool) -> Iterator[None]:
    """The patches, for as long as the context lives; those of padding with a cache for generation.

    Seen in transformers 5.23 and 5.24. Without it no mixture of experts can be traced, and a batch
    that was padded on the right and then continued is answered wrongly wherever a sliding window
    (any type that has one), GPT-Neo's local attention or MPT's bias counts places.
    """
    from transformers.masking_utils import AttentionMaskInterface

    masks: dict[str, Any] = AttentionMaskInterface._global_mapping
    counted = {name: _by_tokens(masks[name]) for name in ("sdpa", "eager")}
    with ExitStack() as patches:
        patches.enter_context(patch(_NEVER_GROUPED, lambda *_: False))
        if generation:
            patches.enter_context(patch.dict(masks, counted))
            for name, instead in _BY_PLACES.items():
                patches.enter_context(patch(name, instead))
        yield


def _by_tokens(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """`make_mask`, with a sliding window that counts the tokens of a row, not cache positions.

    Chunked attention counts in another way and is not changed.
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
    """`mask_function` called with `places` (rows, length) of query and key, not their indices."""

    def by_token(row: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(row, head, places[row, query], places[row, key])

    return by_token


def _after(visible: Any) -> Any:
    """How many visible keys come after each key, as each query sees it: float32.

    `visible` is boolean (rows, 1, queries, keys).
    """
    counted = visible.float()
    return counted.sum(-1, keepdim=True) - counted.cumsum(-1)


def _gpt_neo_attention(
    self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None
) -> tuple[Any, Any]:
    """GPTNeoSelfAttention._attn, whose local windows count places. Without scaling, as there."""
    visible = attention_mask == 0
    if self.attention_type == "local":
        visible = visible & (_after(visible) < self.config.window_size)
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores.masked_fill(~visible, -3.4e38)
    weights = scores.softmax(-1).to(value.dtype)
    return weights @ value, weights


def _mpt_attention(
    self: Any,
    hidden_states: Any,
    position_bias: Any,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """MptAttention.forward, whose bias counts the places between a key and the last one.

    Column 0 of the bias is that of the key that is `max_seq_len - 1` places away.
    """
    rows, length = hidden_states.shape[:2]
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
    query, key, value = (
        part.reshape(rows, length, self.n_heads, self.head_dim).transpose(1, 2)
        for part in mixed.chunk(3, dim=2)
    )
    cache = options[cache_name()]
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    slope = position_bias[:, :, :1] / (position_bias.shape[-1] - 1)
    scores = query @ key.transpose(-1, -2) * self.softmax_scale + slope * _after(~attention_mask)
    scores = scores.masked_fill(attention_mask, -3.4e38)
    weights = scores.softmax(-1)
    return self.out_proj((weights @ value).transpose(1, 2).reshape(rows, length, -1)), weights


_BY_PLACES: dict[str, Callable[..., Any]] = {
    "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention._attn": _gpt_neo_attention,
    "transformers.models.mpt.modeling_mpt.MptAttention.forward": _mpt_attention,
}
