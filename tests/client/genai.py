"""onnxruntime-genai: `python -m tests.client.genai FOLDER NAME`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from tests.client.rows import Expected, main


def generated(model: Any, row: list[int], new: int, adapter: tuple[Any, str] | None = None) -> Any:
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(row) + new, min_length=len(row) + new)
    generator = og.Generator(model, settings)
    if adapter is not None:
        generator.set_active_adapter(*adapter)
    generator.append_tokens(row)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(row) :]]


def decoder(folder: Path, expected: Expected) -> str:
    model = og.Model(str(folder / "decoder"))
    tokenizer = og.Tokenizer(model)
    asked = expected["decoder"]
    for text, row, tokens in zip(expected["texts"], asked["rows"], asked["tokens"], strict=True):
        assert [int(token) for token in tokenizer.encode(text)] == row
        assert generated(model, row, expected["new"]) == tokens
    return "two prompts, its own tokenizer, greedy tokens equal"


def adapters(folder: Path, expected: Expected) -> str:
    asked, place = expected["switchable"], folder / "switchable"
    model = og.Model(str(place))
    loaded = og.Adapters(model)
    for name, tokens in asked["tokens"].items():
        if name:
            loaded.load(str(place / "adapters" / f"{name}.onnx_adapter"), name)
        active = (loaded, name) if name else None
        assert generated(model, asked["row"], expected["new"], active) == tokens, name
    return "base and three adapters, greedy tokens equal"


ROWS = {"decoder": decoder, "adapters": adapters}

if __name__ == "__main__":
    sys.exit(main(ROWS, sys.argv[1:]))
