"""Inputs for any model of transformers, drawn from a seed: a row for each name that its `forward`
documents.

For checkpoints of types and tasks without cases of their own. What is drawn has the sizes that the
model's config gives; two models of one config are asked the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.classes import class_names
from adaptrix_export.arch.task_table import CHOICES
from adaptrix_export.errors import ParityError

ROWS, TOKENS, TARGETS, ANSWERS = 2, 12, 6, 3
SAMPLES = 4000  # of a waveform
SIDE = 64  # of an image, where the config names none
SEED = 0

Drawn = NDArray[Any]
Draw = Callable[[Any, np.random.Generator], Drawn]


def _size(config: Any, *names: str, default: int | None = None) -> int | None:
    """The first number of these names in the config, or in one of its parts."""
    parts = [config, *(p for n, p in vars(config).items() if n.endswith("_config") and p)]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if type(value) is int and value > 0:
                return value
    return default


def _ids(config: Any, draw: np.random.Generator, tokens: int = TOKENS) -> Drawn:
    vocabulary = _size(_text(config), "vocab_size", default=None) or _size(config, "vocab_size")
    if vocabulary is None:
        raise ParityError("config.json", "no vocab_size", "a vocabulary to draw tokens from")
    special = _special(config)
    allowed = np.array([t for t in range(min(vocabulary, 4096)) if t not in special] or [0])
    ids = allowed[draw.integers(0, len(allowed), (ROWS, tokens))]
    end = getattr(_text(config), "eos_token_id", None)
    if type(end) is int and 0 <= end < vocabulary and end not in _placeholders(config):
        ids[:, -1] = end  # CLIP's text tower reads its features there
    return np.asarray(ids, np.int64)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _placeholders(config: Any) -> set[int]:
    """Tokens that stand for images, sounds and the like."""
    return {
        value for name, value in vars(config).items()
        if type(value) is int and name.endswith(("_token_id", "_token_index"))
        and name.partition("_")[0] not in ("bos", "eos", "pad", "sep", "cls", "decoder", "forced")
    }  # fmt: skip


def _special(config: Any) -> set[int]:
    pad = getattr(_text(config), "pad_token_id", None)
    end = getattr(_text(config), "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    return _placeholders(config) | {t for t in (pad, *ends) if type(t) is int}


def _mask(config: Any, draw: np.random.Generator) -> Drawn:
    return np.ones((ROWS, TOKENS), np.int64)


def _decoder_ids(config: Any, draw: np.random.Generator) -> Drawn:
    decoder = getattr(config, "decoder", None) or config
    return _ids(decoder, draw, TARGETS)


def _boxes(config: Any, draw: np.random.Generator) -> Drawn:
    """(rows, tokens, 4): left, top, right, bottom, of a page of 1000."""
    corners = np.sort(draw.integers(0, 1000, (ROWS, TOKENS, 2, 2)), axis=2)
    return np.asarray(corners.reshape(ROWS, TOKENS, 4), np.int64)


def _image_size(config: Any) -> tuple[int, int]:
    parts = [config, *(p for n, p in vars(config).items() if n.endswith("_config") and p)]
    for part in parts:
        size = getattr(part, "image_size", None)
        if isinstance(size, dict):
            size = (size.get("height"), size.get("width"))
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
        if type(size) is int:
            return size, size
    return SIDE, SIDE


def _pixels(config: Any, draw: np.random.Generator) -> Drawn:
    channels = _size(config, "num_channels", "in_channels", default=3)
    frames = _size(config, "num_frames")
    shape: tuple[Any, ...] = (ROWS, channels, *_image_size(config))
    if frames:
        shape = (ROWS, frames, *shape[1:])
    return draw.standard_normal(shape).astype(np.float32)


def _waveform(config: Any, draw: np.random.Generator) -> Drawn:
    """Samples, or for a model of spectrograms (AST) its frames."""
    bins, frames = _size(config, "num_mel_bins"), _size(config, "max_length")
    if bins and frames and not _size(config, "num_feat_extract_layers"):
        return draw.standard_normal((ROWS, frames, bins)).astype(np.float32)
    return draw.standard_normal((ROWS, SAMPLES)).astype(np.float32)


def _features(config: Any, draw: np.random.Generator) -> Drawn:
    """Whisper takes (bins, frames) of one length, other models (frames, bins) of any."""
    bins = _size(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    positions = _size(config, "max_source_positions")
    if bins and positions and not _size(config, "input_feat_per_channel"):
        return draw.standard_normal((ROWS, bins, 2 * positions)).astype(np.float32)
    return draw.standard_normal((ROWS, 64, bins or 80)).astype(np.float32)


# Name of an argument of `forward` -> what is drawn for it, in the order of drawing.
DRAWS: Mapping[str, Draw] = {
    "input_ids": _ids,
    "attention_mask": _mask,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waveform,
    "decoder_input_ids": _decoder_ids,
}
_TEXT_ONLY = ("attention_mask", "bbox")


def drawn_inputs(model: Any) -> dict[str, Any]:
    """Tensors for `model.forward`, by name, the same for every model of one config.

    Raises ParityError for a required argument that nothing is known to be drawn for.
    """
    import torch

    draw = np.random.default_rng(SEED)
    names = set(_arguments_to_draw(model))
    inputs = {name: DRAWS[name](model.config, draw) for name in DRAWS if name in names}
    if type(model).__name__ in class_names(model.config.model_type, CHOICES):
        inputs = {
            n: np.stack([np.roll(v, i, 1) for i in range(ANSWERS)], 1) for n, v in inputs.items()
        }
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _arguments_to_draw(model: Any) -> Iterator[str]:
    """The arguments to draw: those that a model of its modalities is called with."""
    arguments = inspect.signature(model.forward).parameters
    modalities = model.input_modalities
    modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    text = "input_ids" in arguments and (
        "text" in modalities or model.main_input_name == "input_ids"
    )
    # A classifier with a decoder feeds it what the encoder is fed.
    headless = model.can_generate() or model.base_model is model
    encoder_decoder = headless and bool(getattr(model.config, "is_encoder_decoder", False))
    # A model that generates from an image and text is asked for text alone here: how many tokens
    # stand for an image differs from type to type, and its towers are asked by themselves.
    towers = hasattr(model, "get_image_features") and model.can_generate()
    for name, argument in arguments.items():
        required = argument.default is inspect.Parameter.empty
        if argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            continue
        if name in ("input_ids", *_TEXT_ONLY):
            if text:
                yield name
        elif name == "decoder_input_ids":
            if encoder_decoder:
                yield name
        elif name in DRAWS:
            if required or not (text and towers):
                yield name
        elif required:
            raise ParityError(
                type(model).__name__, f"a required input {name!r}", "one of " + ", ".join(DRAWS),
                "no inputs are known for this class; build with --parity off",
            )  # fmt: skip


def flat_outputs(out: Any) -> NDArray[np.float32]:
    """Every float tensor of a model's outputs, in order, as one column; caches are left out."""
    tensors = [t for name, value in out.items() if name != "loss" for t in _floats(name, value)]
    if not tensors:
        raise ParityError("forward", "no float outputs", "at least one")
    return np.concatenate([t.detach().float().numpy().reshape(-1) for t in tensors])[:, None]


def _floats(name: str, value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(name, inner)
    elif isinstance(value, (list, tuple)) and name != "past_key_values":
        for inner in value:
            yield from _floats(name, inner)


def forward_on_drawn(model: Any, inner: Any) -> NDArray[np.float32]:
    """The outputs of one forward pass of `model`, a transformers model or PEFT's around `inner`.

    Raises ParityError where the model does not take what was drawn for it.
    """
    import torch

    fed = drawn_inputs(inner)
    torch.manual_seed(SEED)  # some models draw in evaluation, too
    try:
        with torch.inference_mode():
            return flat_outputs(model(**fed, return_dict=True))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in fed.items())
        raise ParityError(
            type(inner).__name__, f"its forward pass does not take {shapes} ({error})",
            "inputs that it takes", "no other inputs are known for it; build with --parity off",
        ) from error  # fmt: skip


def vision_on_drawn(inner: Any) -> NDArray[np.float32]:
    """The outputs of the vision tower of a generating model on drawn images.

    `inner` is the plain model with PEFT's layers in place. Raises as `forward_on_drawn` does.
    """
    import torch

    fed = _image_inputs(inner)
    try:
        with torch.inference_mode():
            features = inner.get_image_features(**fed)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ParityError(
            type(inner).__name__, f"its vision tower does not take drawn images ({error})",
            "inputs that it takes", "no other inputs are known for it; build with --parity off",
        ) from error  # fmt: skip
    values = features if isinstance(features, Mapping) else {"features": features}
    return flat_outputs(values)


def _image_inputs(inner: Any) -> dict[str, Any]:
    """Images as they are, or cut into patches with the grid beside (Qwen's)."""
    import torch

    draw = np.random.default_rng(SEED)
    arguments = inspect.signature(inner.get_image_features).parameters
    vision = inner.config.vision_config
    if "image_grid_thw" in arguments:
        side = vision.patch_size
        channels = _size(vision, "in_channels", "num_channels", "in_chans", default=3) or 3
        grid = 2 * int(getattr(vision, "spatial_merge_size", 1))
        width = channels * getattr(vision, "temporal_patch_size", 1) * side * side
        pixels = draw.standard_normal((grid * grid, width)).astype(np.float32)
        return {
            "pixel_values": torch.from_numpy(pixels),
            "image_grid_thw": torch.tensor([[1, grid, grid]]),
        }
    fed: dict[str, Any] = {"pixel_values": torch.from_numpy(_pixels(vision, draw))}
    if "pixel_attention_mask" in arguments:  # one image a row, in Idefics' form
        fed["pixel_values"] = fed["pixel_values"][:, None]
    if "image_sizes" in arguments:
        fed["image_sizes"] = torch.tensor([list(_image_size(vision))] * ROWS)
    return fed
