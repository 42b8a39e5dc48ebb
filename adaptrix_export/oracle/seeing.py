"""Vision-language models: what they are asked with an image, and what they answer.

A row is text, an image's tokens, and text again. The live model is asked in one call; the artifact
embeds the tokens, puts the image's features in their places, and feeds the decoder a part at a time
through its cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.inputs import random_inputs
from adaptrix_export.arch.pieces import DECODER, EMBEDDING, SEEN, VISION
from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.translated import Source
from adaptrix_export.runtime.layout import located

BEFORE, AFTER = 5, 12  # tokens of text on either side of an image
IMAGE_TOKEN = "image_token"  # noqa: S105  # the name of an array, no password
_PAST = "past_key_values."


def seen_sources(model: Any) -> dict[str, dict[str, NDArray[Any]]]:
    """One row with an image, and two: ids, pixel values, and which token stands for an image."""
    config = model.config
    token = getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token
    return {name: _source(model, rows, int(token)) for name, rows in (("alone", 1), ("batch", 2))}


def _source(model: Any, rows: int, token: int) -> dict[str, NDArray[Any]]:
    """An image's tokens stand after the first words of its row; a row with fewer images has more
    words."""
    config = model.config
    pixels = random_inputs(SEEN[config.model_type], config, rows, seed=3)
    images = _images(pixels["pixel_values"])
    places = len(_features(model, pixels)) // int(images.sum())
    text = config.get_text_config()
    length = BEFORE + places * int(images.max()) + AFTER
    ids = np.random.default_rng(4).integers(3, text.vocab_size, (rows, length))
    ids[ids == token] = 3
    for row, count in zip(ids, images, strict=True):
        row[BEFORE : BEFORE + places * count] = token
    return {"input_ids": ids, **pixels, IMAGE_TOKEN: np.array([token])}


def _images(pixels: NDArray[Any]) -> NDArray[Any]:
    """How many images each row has: one, or those of several that are not zeros."""
    if pixels.ndim == len(("row", "channel", "height", "width")):
        return np.ones(len(pixels), int)
    return np.asarray(pixels.any(axis=(2, 3, 4)).sum(axis=1))


def _pixels(source: Source) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in source.items() if name.startswith("pixel_")}


def _features(model: Any, pixels: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """(tokens of all images, width)."""
    import torch

    fed = {name: torch.from_numpy(value) for name, value in pixels.items()}
    with torch.inference_mode():
        answer = model.get_image_features(**fed).pooler_output
    return np.concatenate([one.float().numpy() for one in answer])


class LiveSeeing:
    """A transformers model `plain`, or PEFT's around it."""

    def __init__(self, model: Any, plain: Any) -> None:
        self._model, self._plain = model, plain

    def look(self, source: Source) -> Logits:
        """The features of the images: (tokens of all images, width)."""
        return _features(self._plain, _pixels(source))

    def converse(self, source: Source, cut: int) -> Logits:
        """Logits (tokens of all rows, vocabulary) of one call, whatever `cut` is."""
        import torch

        ids = torch.from_numpy(source["input_ids"])
        pixels = {name: torch.from_numpy(value) for name, value in _pixels(source).items()}
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids, **pixels, attention_mask=torch.ones_like(ids), use_cache=False,
            ).logits  # fmt: skip
        return np.concatenate(logits.float().numpy())


class OnnxSeeing:
    """Three sessions of ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._embedding, self._vision, self._decoder = (
            ort.InferenceSession(
                str(located(folder, file)), options, providers=["CPUExecutionProvider"]
            )
            for file in (EMBEDDING, VISION, DECODER)
        )

    def look(self, source: Source) -> Logits:
        return np.concatenate(self._seen(source))

    def _seen(self, source: Source) -> NDArray[np.float32]:
        return cast(NDArray[np.float32], self._vision.run(["image_features"], _pixels(source))[0])

    def converse(self, source: Source, cut: int) -> Logits:
        """Fed all but the last `cut` tokens, then one by one."""
        ids, logits = source["input_ids"], []
        embeds = np.array(self._embedding.run(["inputs_embeds"], {"input_ids": ids})[0])
        places = ids == source[IMAGE_TOKEN][0]
        embeds[places] = self._seen(source).reshape(-1, embeds.shape[2])
        names = [value.name for value in self._decoder.get_outputs()]
        cache = self._empty(len(ids))
        start = ids.shape[1] - cut
        for first, last in ((0, start), *((i, i + 1) for i in range(start, ids.shape[1]))):
            mask = np.ones((len(ids), last), np.int64)
            fed = {"inputs_embeds": embeds[:, first:last], "attention_mask": mask, **cache}
            out = dict(zip(names, self._decoder.run(None, fed), strict=True))
            logits.append(np.asarray(out.pop("logits"), np.float32))
            cache = {name.replace("present.", _PAST, 1): value for name, value in out.items()}
        return np.concatenate(np.concatenate(logits, axis=1))

    def _empty(self, rows: int) -> dict[str, Any]:
        return {
            value.name: np.zeros(
                [rows, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32
            )
            for value in self._decoder.get_inputs()
            if value.name.startswith(_PAST)
        }
