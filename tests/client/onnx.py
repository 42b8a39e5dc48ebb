"""ONNX Runtime by itself, and the usual tools on graphs: `python -m tests.client.onnx FOLDER NAME`.

Needs numpy and onnxruntime for `plain` and `adapters`, onnx for the rest, and nothing of ours.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.client.rows import Expected, main

CPU = ["CPUExecutionProvider"]


def greedy(session: Any, row: list[int], new: int, options: Any = None) -> list[int]:
    """Greedy tokens with the cache handed from step to step."""
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs()]
    needed = {value.name for value in session.get_inputs()}
    tokens, past, cache = list(row), 0, empty
    while len(tokens) < len(row) + new:
        ids = np.array([tokens[past:]], np.int64)
        fed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(past, len(tokens), dtype=np.int64)[None],
        }
        given = {name: value for name, value in fed.items() if name in needed}
        out = dict(zip(names, session.run(None, {**given, **cache}, options), strict=True))
        past = len(tokens)
        tokens.append(int(out["logits"][0, -1].argmax()))
        cache = {n.replace("present.", "past_key_values."): v for n, v in out.items()
                 if n.startswith("present.")}  # fmt: skip
    return tokens[len(row) :]


DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def opened(path: Path, folder: Path | None = None) -> Any:
    return ort.InferenceSession(str(path), providers=CPU)


def plain(folder: Path, expected: Expected) -> str:
    asked = expected["decoder"]
    session = opened(folder / "decoder" / "onnx" / "model.onnx")
    for row, tokens in zip(asked["rows"], asked["tokens"], strict=True):
        assert greedy(session, row, expected["new"]) == tokens
    return "two prompts, greedy tokens equal"


def adapters(folder: Path, expected: Expected) -> str:
    """`.onnx_adapter` files through RunOptions, the empty slots being inputs with defaults."""
    asked, place = expected["switchable"], folder / "switchable"
    session = opened(place / "onnx" / "model.onnx")
    for name, tokens in asked["tokens"].items():
        options = ort.RunOptions()
        if name:
            adapter = ort.LoraAdapter()
            adapter.Load(str(place / "adapters" / f"{name}.onnx_adapter"))
            options.add_active_adapter(adapter)
        assert greedy(session, asked["row"], expected["new"], options) == tokens, name
    return "base and three adapters, greedy tokens equal"


def converted(folder: Path, expected: Expected, convert: Any, least: float) -> str:
    """Share of positions at which a graph that `convert` made picks the expected token, each with
    the expected tokens before it."""
    asked = expected["decoder"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "model.onnx")
        convert(folder / "decoder" / "onnx" / "model.onnx", path)
        session = opened(path)
        pairs = [
            (greedy(session, [*row, *tokens[:place]], 1)[0], token)
            for row, tokens in zip(asked["rows"], asked["tokens"], strict=True)
            for place, token in enumerate(tokens)
        ]
    same = sum(one == other for one, other in pairs) / len(pairs)
    assert same >= least, f"{same:.0%} of the positions"
    return f"{same:.0%} of the float graph's choices"


def float16(folder: Path, expected: Expected) -> str:
    """ONNX Runtime's converter, with float inputs and outputs kept."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    def convert(source: Path, path: Path) -> None:
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)

    return converted(folder, expected, convert, 0.9)


def nbits(folder: Path, expected: Expected) -> str:
    """ONNX Runtime's MatMulNBitsQuantizer, 8 bits."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def convert(source: Path, path: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=32)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=False)

    return converted(folder, expected, convert, 0.9)


def dynamic(folder: Path, expected: Expected) -> str:
    """`quantize_dynamic`: int8 weights, activations scaled as they come."""
    from onnxruntime.quantization import quantize_dynamic

    return converted(folder, expected, quantize_dynamic, 0.7)


ROWS = {"plain": plain, "adapters": adapters, "float16": float16, "nbits": nbits,
        "dynamic": dynamic}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(ROWS, sys.argv[1:]))
