"""One decoder graph in ONNX Runtime: what it takes, what it gives, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError

GRAPH = "model.onnx"
LOGITS = "logits"

# ONNX Runtime's name of a cache element type -> its number in ONNX.
_CACHE_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CacheSlot:
    """A cache tensor: `past` (batch, kv_heads, past, head_dim) goes in, `present` comes out."""

    past: str
    present: str
    heads: int
    size: int
    element: int


@dataclass(frozen=True)
class State:
    """The cache after `length` tokens, as ONNX Runtime's own values, in slot order."""

    cache: tuple[Any, ...]
    length: int


class DecoderGraph:
    """An ONNX Runtime session over `model.onnx` of an artifact folder.

    Raises SourceError if the folder holds no graph, or one that is not a language model.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import onnxruntime

        path = folder / GRAPH
        if not path.is_file():
            raise SourceError(
                str(folder),
                f"no {GRAPH}",
                "an ONNX artifact folder",
                "name a folder that `build --target onnx` made",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: one a physical core
        options.log_severity_level = 3  # errors; its warnings are about its own optimizer
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no narrower base
            raise SourceError(str(path), f"cannot be loaded ({error})", "an ONNX model") from error
        self._values = onnxruntime.OrtValue
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = [value.name for value in self._session.get_outputs()]
        if not {"input_ids", "attention_mask"} <= inputs.keys() or LOGITS not in outputs:
            raise SourceError(
                str(path),
                f"takes {', '.join(inputs)} and gives {', '.join(outputs)}",
                f"input_ids, attention_mask and {LOGITS}",
                "only language models can be run",
            )
        self.takes_positions = "position_ids" in inputs
        self._slots = tuple(_slots(inputs, outputs, path))
        self._fetched = [LOGITS, *(slot.present for slot in self._slots)]

    @property
    def has_cache(self) -> bool:
        return bool(self._slots)

    def start(self, batch: int = 1) -> State:
        """The state before any token."""
        empty = (
            self._values.ortvalue_from_shape_and_type([batch, s.heads, 0, s.size], s.element)
            for s in self._slots
        )
        return State(tuple(empty), 0)

    def step(self, ids: Ids, mask: Ids, state: State) -> tuple[NDArray[np.floating[Any]], State]:
        """Run `ids` (batch, seq) behind `state`; `mask` is (batch, state.length + seq).

        Returns the logits (batch, seq, vocab) and the state after. The cache goes from output to
        input as it is, never through numpy.
        """
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self.takes_positions:
            # As transformers counts: pads have no position, whichever side they stand on.
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, state.length :]
        values = {
            name: self._values.ortvalue_from_numpy(np.ascontiguousarray(value, dtype=np.int64))
            for name, value in feeds.items()
        }
        values |= {slot.past: past for slot, past in zip(self._slots, state.cache, strict=True)}
        logits, *cache = self._session.run_with_ort_values(self._fetched, values)
        return logits.numpy(), State(tuple(cache), mask.shape[1])


def _slots(inputs: dict[str, Any], outputs: list[str], path: Path) -> list[CacheSlot]:
    slots = []
    for name, value in inputs.items():
        if not name.startswith("past_key_values."):
            continue
        present = name.replace("past_key_values.", "present.", 1)
        element = _CACHE_TYPES.get(value.type)
        if present not in outputs or element is None:
            raise SourceError(
                f"{path}: {name}",
                f"{value.type} without {present}" if element else value.type,
                "a float cache that comes back out",
                "build again",
            )
        _, heads, _, size = value.shape
        slots.append(CacheSlot(name, present, heads, size, element))
    return slots
