"""Sentence Transformers with its ONNX backend and exports, and fastembed.

`python -m tests.client.sentences FOLDER NAME`
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.client.rows import Expected, main


def cosine(answer: Any, expected: Expected) -> float:
    """The smallest of the sentences'."""
    one, other = np.asarray(answer), np.asarray(expected["sentence"]["vectors"])
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / lengths).min())


def encode(folder: Path, expected: Expected) -> str:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "sentence"), backend="onnx")
    least = cosine(model.encode(expected["sentences"]), expected)
    assert least >= 0.99999, least
    return f"cosine at least {least:.6f}"


def optimized(folder: Path, expected: Expected) -> str:
    """Its graph optimization, level O2, written beside ours and loaded by name."""
    from sentence_transformers import SentenceTransformer, export_optimized_onnx_model

    with tempfile.TemporaryDirectory() as scratch:
        place = shutil.copytree(folder / "sentence", Path(scratch, "model"))
        model = SentenceTransformer(str(place), backend="onnx")
        export_optimized_onnx_model(model, "O2", str(place))
        return again(place, "onnx/model_O2.onnx", expected, 0.9999)


def quantized(folder: Path, expected: Expected) -> str:
    """Its dynamic int8."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    with tempfile.TemporaryDirectory() as scratch:
        place = shutil.copytree(folder / "sentence", Path(scratch, "model"))
        model = SentenceTransformer(str(place), backend="onnx")
        export_dynamic_quantized_onnx_model(model, "avx2", str(place))
        return again(place, "onnx/model_quint8_avx2.onnx", expected, 0.95)


def again(place: Path, file: str, expected: Expected, least: float) -> str:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(place), backend="onnx", model_kwargs={"file_name": file})
    smallest = cosine(model.encode(expected["sentences"]), expected)
    assert smallest >= least, smallest
    return f"cosine at least {smallest:.5f}"


def fastembed(folder: Path, expected: Expected) -> str:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="adapted/minilm", pooling=PoolingType.MEAN, normalization=True,
        sources=ModelSource(hf="adapted/minilm"), dim=384, model_file="onnx/model.onnx",
    )  # fmt: skip
    model = TextEmbedding("adapted/minilm", specific_model_path=str(folder / "sentence"))
    least = cosine([list(v) for v in model.embed(expected["sentences"], batch_size=1)], expected)
    assert least >= 0.99999, least
    return f"cosine at least {least:.6f}"


ROWS = {"encode": encode, "optimized": optimized, "quantized": quantized, "fastembed": fastembed}

if __name__ == "__main__":
    sys.exit(main(ROWS, sys.argv[1:]))
