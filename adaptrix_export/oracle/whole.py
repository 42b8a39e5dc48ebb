"""Models that answer in one call: what they are fed, drawn from a seed, and what they answer.

Every kind of input is a row of `arch/inputs.py`, every kind of model one of `arch/tasks.py`; an
output of several rows becomes (positions, width), so that one comparison serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.inputs import random_inputs
from adaptrix_export.arch.pieces import Piece, pieces_of
from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.translated import Source
from adaptrix_export.runtime.layout import located

ROWS = 3  # of a batch


class Answering(Protocol):
    """The reference, or an artifact."""

    def answer(self, piece: Piece, fed: Source, output: str) -> Logits:
        """One output of a call of one piece, as (positions, width)."""
        ...


def drawn_sources(names: Iterable[str], config: Any) -> dict[str, dict[str, NDArray[Any]]]:
    """Values for these inputs: one row, and several others."""
    names = tuple(names)
    return {
        "alone": random_inputs(names, config, 1, seed=1),
        "batch": random_inputs(names, config, ROWS, seed=2),
    }


def as_positions(value: NDArray[Any]) -> Logits:
    """Any output as (positions, width); of a map (rows, width, height, ...) each place is one."""
    values = np.asarray(value, np.float32)
    if values.ndim == 4:
        values = np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[None]


class LiveWhole:
    """A transformers model, or PEFT's around one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, piece: Piece, fed: Source, output: str) -> Logits:
        import inspect

        import torch

        plain = self._model.get_base_model() if hasattr(self._model, "get_base_model") else None
        method = getattr(plain or self._model, piece.method)
        known = inspect.signature(method).parameters
        arguments = {n: torch.from_numpy(v) for n, v in fed.items() if n in known}
        with torch.inference_mode():
            values = method(**arguments)[piece.outputs[output]]
        return as_positions(values.float().numpy())


def pieces_of_model(model: Any, task: str) -> tuple[Piece, ...]:
    """The graphs that a live model's artifact has."""
    kind = str(model.config.model_type)
    return pieces_of(kind, task, type(model).__name__, str(model.main_input_name))


class OnnxWhole:
    """ONNX Runtime on the CPU, a session for each file."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime as ort

        self._options = ort.SessionOptions()
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._folder = folder
        self._sessions: dict[str, Any] = {}

    def answer(self, piece: Piece, fed: Source, output: str) -> Logits:
        import onnxruntime as ort

        if piece.file not in self._sessions:
            self._sessions[piece.file] = ort.InferenceSession(
                str(located(self._folder, piece.file)),
                self._options,
                providers=["CPUExecutionProvider"],
            )
        session = self._sessions[piece.file]
        known = {value.name for value in session.get_inputs()}
        (values,) = session.run([output], {n: v for n, v in fed.items() if n in known})
        return as_positions(values)
