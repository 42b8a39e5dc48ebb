"""Optimum's ORTModel classes: `python -m tests.client.optimum_models FOLDER NAME`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.onnxruntime import (
    ORTModelForCausalLM,
    ORTModelForFeatureExtraction,
    ORTModelForImageClassification,
    ORTModelForSeq2SeqLM,
    ORTModelForSequenceClassification,
)
from transformers import AutoTokenizer

from tests.client.rows import Expected, main

CLOSE = 1e-4


def close(answer: Any, expected: Any) -> str:
    apart = float(np.abs(np.asarray(answer) - np.asarray(expected)).max())
    assert apart <= CLOSE, apart
    return f"at most {apart:.1e} apart"


def greedy(new: int) -> dict[str, Any]:
    return {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 2}


def causal(folder: Path, expected: Expected) -> str:
    place, asked = folder / "decoder", expected["decoder"]
    model, tokenizer = ORTModelForCausalLM.from_pretrained(place), tokenizer_of(place)
    for text, row, tokens in zip(expected["texts"], asked["rows"], asked["tokens"], strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == row
        answer = model.generate(**encoded, **greedy(expected["new"]))
        assert answer[0, len(row) :].tolist() == tokens
    return "two prompts, greedy tokens equal"


def batch(folder: Path, expected: Expected) -> str:
    """Both prompts at once, the shorter one padded on the left."""
    place, asked = folder / "decoder", expected["decoder"]
    model, tokenizer = ORTModelForCausalLM.from_pretrained(place), tokenizer_of(place)
    tokenizer.padding_side = "left"
    encoded = tokenizer(expected["texts"], padding=True, return_tensors="pt")
    answer = model.generate(**encoded, **greedy(expected["new"]))
    length = encoded["input_ids"].shape[1]
    assert answer[:, length:].tolist() == asked["tokens"]
    return "a left-padded batch, greedy tokens equal"


def features(folder: Path, expected: Expected) -> str:
    place = folder / "sentence"
    model, tokenizer = ORTModelForFeatureExtraction.from_pretrained(place), tokenizer_of(place)
    vectors = []
    for text in expected["sentences"]:
        hidden = model(**tokenizer([text], return_tensors="pt")).last_hidden_state
        vectors.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0].numpy())
    return close(vectors, expected["sentence"]["vectors"])


def classifier(folder: Path, expected: Expected) -> str:
    place = folder / "classifier"
    model = ORTModelForSequenceClassification.from_pretrained(place)
    tokenizer = tokenizer_of(place)
    logits = [model(**tokenizer(t, return_tensors="pt")).logits[0] for t in expected["texts"]]
    return close(torch.stack(logits), expected["classifier"]["logits"])


def seq2seq(folder: Path, expected: Expected) -> str:
    asked = expected["seq2seq"]
    model = ORTModelForSeq2SeqLM.from_pretrained(folder / "seq2seq")
    row = torch.tensor([asked["row"]])
    settings = {**greedy(expected["new"]), "attention_mask": torch.ones_like(row)}
    assert model.generate(row, **settings)[0].tolist() == asked["tokens"]
    assert model.generate(row, num_beams=3, **settings)[0].tolist() == asked["beams"]
    return "greedy and three beams, tokens equal"


def image(folder: Path, expected: Expected) -> str:
    model = ORTModelForImageClassification.from_pretrained(folder / "image")
    pixels = torch.tensor(expected["image"]["pixels"], dtype=torch.float32)
    return close(model(pixel_values=pixels).logits[0], expected["image"]["logits"])


def tokenizer_of(place: Path) -> Any:
    return AutoTokenizer.from_pretrained(place)


ROWS = {"causal": causal, "batch": batch, "features": features, "classifier": classifier,
        "seq2seq": seq2seq, "image": image}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(ROWS, sys.argv[1:]))
