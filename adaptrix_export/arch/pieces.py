"""The graphs of models without a cache, a row for each task: file, inputs, outputs.

File names and value names are those that optimum and transformers.js look for. A piece that is a
part of the model (CLIP's text tower) names the method of the live model that computes it. Models
with a `Family` row, and models that generate, are exported by `graph/frontends/traced.py` and
`traced_parts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adaptrix_export.arch.task_table import (
    ANSWERS,
    AUDIO,
    FEATURES,
    GRAPH,
    IMAGES,
    MASKED,
    SEQUENCES,
    SPEECH,
    TEXT,
    TOKENS,
    VISION_LANGUAGE,
    ZERO_SHOT_IMAGES,
)


@dataclass(frozen=True)
class Piece:
    """One graph. `inputs` are rows of `arch/inputs.py`, of which a model takes those it knows;
    `outputs` maps the graph's outputs to fields of the output of `method`."""

    file: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    method: str = "forward"


def _whole(inputs: tuple[str, ...], *outputs: str) -> tuple[Piece, ...]:
    return (Piece(GRAPH, inputs, {name: name for name in outputs}),)


_PIXELS, _SOUND = ("pixel_values",), ("input_values",)
_SIMILAR = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def _towers(text: str, image: str) -> tuple[Piece, ...]:
    """Both towers in one graph, and each in its own; `text` and `image` name the latter's
    outputs."""
    ids = ("input_ids", "attention_mask")
    return (
        *_whole((*ids, *_PIXELS), *_SIMILAR),
        Piece("text_model.onnx", ids, {text: "pooler_output"}, "get_text_features"),
        Piece("vision_model.onnx", _PIXELS, {image: "pooler_output"}, "get_image_features"),
    )


_CTC = _whole(_SOUND, "logits")
PIECES: Mapping[str, tuple[Piece, ...]] = {
    MASKED: _whole(TEXT, "logits"),
    ANSWERS: _whole(TEXT, "start_logits", "end_logits"),
    SEQUENCES: _whole(TEXT, "logits"),
    TOKENS: _whole(TEXT, "logits"),
    FEATURES: _whole(TEXT, "last_hidden_state"),
    IMAGES: _whole(_PIXELS, "logits"),
    "semantic-segmentation": _whole(_PIXELS, "logits"),
    "depth-estimation": _whole(_PIXELS, "predicted_depth"),
    "masked-im": _whole(_PIXELS, "reconstruction"),
    "object-detection": _whole(_PIXELS, "logits", "pred_boxes"),
    AUDIO: _whole(_SOUND, "logits"),
    "audio-frame-classification": _whole(_SOUND, "logits"),
    "audio-xvector": _whole(_SOUND, "logits", "embeddings"),
    ZERO_SHOT_IMAGES: _towers("text_embeds", "image_embeds"),
}
# Vision-language models whose image features are put in the places of image tokens, with positions
# that count tokens and tokens that see those before them alone: what their vision encoder takes.
SEEN: Mapping[str, tuple[str, ...]] = {
    "llava": _PIXELS,
    "internvl": _PIXELS,
    "aya_vision": _PIXELS,
    "idefics3": (*_PIXELS, "pixel_attention_mask"),
    "smolvlm": (*_PIXELS, "pixel_attention_mask"),
}
EMBEDDING, VISION, DECODER = (
    "embed_tokens.onnx", "vision_encoder.onnx", "decoder_model_merged.onnx",
)  # fmt: skip
# The outputs of SigLIP's towers have the names of its single-tower classes.
_BY_TYPE = {("siglip", ZERO_SHOT_IMAGES): _towers("pooler_output", "pooler_output")}


def _seeing(pixels: tuple[str, ...]) -> tuple[Piece, ...]:
    return (
        Piece(EMBEDDING, ("input_ids",), {"inputs_embeds": "inputs_embeds"}),
        Piece(VISION, pixels, {"image_features": "pooler_output"}),
        Piece(DECODER, ("inputs_embeds", "attention_mask"), {"logits": "logits"}),
    )


def pieces_of(kind: str, task: str, class_name: str, main_input: str) -> tuple[Piece, ...]:
    """The graphs of a model of type `kind`, whose class has `main_input_name` `main_input`; none
    for a task without a row."""
    if task == VISION_LANGUAGE:
        return _seeing(SEEN[kind]) if kind in SEEN else ()
    if task == SPEECH:
        pieces = _CTC if class_name.endswith("ForCTC") else ()
    else:
        pieces = _BY_TYPE.get((kind, task), PIECES.get(task, ()))
    if len(pieces) == 1 and main_input not in pieces[0].inputs:
        return (replace(pieces[0], inputs=(main_input,)),)
    return pieces
