"""What a vision encoder's graph computes: the features that take the places of image tokens.

The live models answer `get_image_features`, but cut its answer into a Python list of one tensor an
image, which a trace would freeze at the number of images that it saw. A row of `FEATURES` says how
a type answers all of them in one tensor: (images, tokens, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def image_features(model: Any, pixels: Mapping[str, Any]) -> Any:
    """(images, tokens, width), by the model's own parts, of the inputs that `SEEN` names."""
    made: Callable[..., Any] = FEATURES.get(model.config.model_type, _answered)
    return made(model, **pixels)


def _answered(model: Any, pixel_values: Any) -> Any:
    return model.get_image_features(pixel_values=pixel_values).pooler_output


def _llava(model: Any, pixel_values: Any) -> Any:
    """Hidden states of one layer, or of several side by side, without the class token where the
    config says so."""
    config, inner = model.config, model.model
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    start = 1 if config.vision_feature_select_strategy == "default" else 0
    return inner.multi_modal_projector(torch.cat([states[n][:, start:] for n in layers], dim=-1))


def _idefics3(model: Any, pixel_values: Any, pixel_attention_mask: Any) -> Any:
    """`pixel_values` (rows, images, channels, height, width), the mask without the channels.

    An image of zeros fills up a row with fewer images than others: it has no features.
    """
    inner = model.model
    pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
    side = model.config.vision_config.patch_size
    patches = mask.unfold(1, side, side).unfold(2, side, side)
    seen = inner.vision_model(
        pixel_values=pixels, patch_attention_mask=patches.sum(dim=(-1, -2)) > 0
    ).last_hidden_state
    return inner.connector(seen)[(pixels != 0).flatten(1).any(1)]


FEATURES: dict[str, Callable[..., Any]] = {
    "llava": _llava, "idefics3": _idefics3, "smolvlm": _idefics3
}  # fmt: skip
