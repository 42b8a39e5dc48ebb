"""The inputs of models, a row for each: their sizes, and how random values for tests are drawn.

Sizes come from the live config: an image has the size that the model was trained with, a waveform
any length. The trace uses the dynamic sizes, the parity check the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import UnsupportedError

Sizes = tuple[int | str, ...]
BATCH = "batch"
SEQUENCE = "sequence_length"
# The values of dynamic sizes in a test; enough samples for the convolutions of wav2vec2.
IMAGES = "images"
LENGTHS = {SEQUENCE: 11, "samples": 4000, IMAGES: 2}


@dataclass(frozen=True)
class ModelInput:
    """`sizes`: those after the batch axis, a name for a dynamic one; `draw`: random values of a
    shape for a config."""

    sizes: Callable[[Any], Sizes]
    draw: Callable[[np.random.Generator, tuple[int, ...], Any], NDArray[Any]]
    integer: bool = False


def nested(config: Any, part: str) -> Any:
    """The config of a part of the model, or the model's own if it has no such part."""
    return getattr(config, part, None) or config


def _image(config: Any) -> Sizes:
    own = nested(config, "vision_config")
    size = getattr(own, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    one = (int(getattr(own, "num_channels", 3)), int(height), int(width))
    return (IMAGES, *one) if getattr(config, "model_type", "") in SEVERAL_IMAGES else one


def _image_mask(config: Any) -> Sizes:
    several, _, *sides = _image(config)
    return (several, *sides)


def _speech(config: Any) -> Sizes:
    return (int(config.num_mel_bins), 2 * int(config.max_source_positions))


def _spectrogram_or_wave(config: Any) -> Sizes:
    """AST takes a spectrogram of one length, wav2vec2 a waveform."""
    if getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
        return (int(config.max_length), int(config.num_mel_bins))
    return ("samples",)


def _tokens(config: Any) -> Sizes:
    """SigLIP's text has one length, and no mask."""
    fixed = getattr(config, "model_type", "") in FIXED_TEXT
    text = nested(config, "text_config")
    return (int(text.max_position_embeddings),) if fixed else (SEQUENCE,)


def _draw_tokens(
    generator: np.random.Generator, shape: tuple[int, ...], config: Any
) -> NDArray[Any]:
    """Random tokens except special ones, then the end token, where CLIP pools."""
    text = nested(config, "text_config")
    special = {getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    ids = generator.integers(0, int(text.vocab_size), size=shape)
    usual = next(i for i in range(int(text.vocab_size)) if i not in special)
    ids[np.isin(ids, [i for i in special if isinstance(i, int)])] = usual
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and end < int(text.vocab_size):
        ids[:, -1] = end
    return ids.astype(np.int64)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], config: Any) -> NDArray[Any]:
    return generator.standard_normal(shape).astype(np.float32)


def _draw_pixels(
    generator: np.random.Generator, shape: tuple[int, ...], config: Any
) -> NDArray[Any]:
    """Of several rows of several images, the last one has an image less: zeros in its place."""
    pixels = _normal(generator, shape, config)
    if len(shape) > len(("row", "channel", "height", "width")) and len(pixels) > 1:
        pixels[-1, -1] = 0
    return pixels


def _draw_image_mask(
    generator: np.random.Generator, shape: tuple[int, ...], config: Any
) -> NDArray[Any]:
    """The first image of each row is not as wide as the others: what is right of it is padding."""
    mask = np.ones(shape, bool)
    mask[:, 0, :, shape[-1] // 2 :] = False
    return mask


def _draw_mask(generator: np.random.Generator, shape: tuple[int, ...], config: Any) -> NDArray[Any]:
    """Ones, and two pads at the end of the last of several rows."""
    mask = np.ones(shape, np.int64)
    if len(mask) > 1:
        mask[-1, -2:] = 0
    return mask


def _halves(generator: np.random.Generator, shape: tuple[int, ...], config: Any) -> NDArray[Any]:
    types = np.zeros(shape, np.int64)
    types[:, shape[1] // 2 :] = 1
    return types


# Types that take several images a row.
SEVERAL_IMAGES = ("idefics3", "smolvlm")
# Types whose text inputs have a fixed length.
FIXED_TEXT = ("siglip", "siglip2")
INPUTS: Mapping[str, ModelInput] = {
    "input_ids": ModelInput(_tokens, _draw_tokens, integer=True),
    "attention_mask": ModelInput(_tokens, _draw_mask, integer=True),
    "token_type_ids": ModelInput(_tokens, _halves, integer=True),
    "pixel_values": ModelInput(_image, _draw_pixels),
    "pixel_attention_mask": ModelInput(_image_mask, _draw_image_mask),
    "input_features": ModelInput(_speech, _normal),
    "input_values": ModelInput(_spectrogram_or_wave, _normal),
}


def accepted_inputs(names: Iterable[str], config: Any) -> tuple[str, ...]:
    """The names of the inputs among `names` that a model of this config accepts."""
    fixed = getattr(config, "model_type", "") in FIXED_TEXT
    segments = (getattr(config, "type_vocab_size", 0) or 0) > 1
    dropped = {"attention_mask"} if fixed else set()
    dropped |= set() if segments else {"token_type_ids"}
    return tuple(name for name in names if name not in dropped)


def sizes_of(name: str, config: Any, place: str = "config.json") -> Sizes:
    """The sizes of an input after the batch. Raises UnsupportedError if the config lacks one."""
    try:
        return INPUTS[name].sizes(config)
    except AttributeError as error:
        raise UnsupportedError(
            place, str(error), f"the sizes of {name}", "use --target safetensors"
        ) from error


def random_inputs(
    names: Iterable[str], config: Any, rows: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Random inputs for a batch of `rows` rows, the same for the same seed."""
    generator = np.random.default_rng(seed)
    return {
        name: INPUTS[name].draw(
            generator,
            (rows, *(LENGTHS.get(str(n), n) for n in sizes_of(name, config))),  # type: ignore[arg-type]
            config,
        )
        for name in accepted_inputs(names, config)
    }
