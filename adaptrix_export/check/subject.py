"""The artifact under test, in the runtime that will serve it, one step of its cache at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.check.compare import Logits
from adaptrix_export.check.job import Job
from adaptrix_export.errors import ParityError
from adaptrix_export.load.task import GENERATION

Ids = NDArray[np.int64]


class Subject(Protocol):
    """A causal LM with a cache (`step`), or a model that answers whole rows (`encode`)."""

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        """Whole rows: (batch, tokens, width) features or token logits, (batch, 1, labels)."""
        ...

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        """Feeds `ids` (batch, new) after `cache` (None at first).

        `mask` (batch, past + new) is 0 at pads, `positions` (batch, new). Returns logits
        (batch, new, vocabulary) and the cache for the next step.
        """
        ...


class OnnxSubject:
    """ONNX Runtime on the CPU, with the graph interface that `design.md` fixes."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        known = {"input_ids", "attention_mask", "position_ids"}
        if "last_hidden_state" in self._outputs:
            known = {"input_ids", "attention_mask", "token_type_ids"}
        odd = [n for n in self._inputs if n not in known and not n.startswith("past_key_values.")]
        if odd or not {"logits", "last_hidden_state"} & set(self._outputs):
            raise ParityError(
                "model.onnx",
                f"inputs {odd} beyond the interface" if odd else "no output named logits",
                "input_ids, attention_mask, position_ids, past_key_values.* -> logits, present.*",
            )

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        past = cache if cache is not None else self._empty(len(ids))
        offered = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        fed = {name: value for name, value in offered.items() if name in self._inputs}
        out = dict(zip(self._outputs, self._session.run(None, fed), strict=True))
        logits = np.asarray(out.pop("logits"))
        present = {
            name.replace("present.", "past_key_values.", 1): value for name, value in out.items()
        }
        return logits.astype(np.float32), present

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        offered = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        fed = {name: value for name, value in offered.items() if name in self._inputs}
        return np.asarray(self._session.run(["last_hidden_state"], fed)[0], np.float32)

    def _empty(self, batch: int) -> dict[str, Any]:
        """A cache of no tokens: symbolic sizes are the batch (first axis) and the past (others)."""
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past: dict[str, Any] = {}
        for name, value in self._inputs.items():
            if not name.startswith("past_key_values."):
                continue
            if value.type not in types:
                raise ParityError("model.onnx", f"{name} has type {value.type}", f"{set(types)}")
            sizes = [n if isinstance(n, int) else 0 for n in value.shape]
            past[name] = np.zeros([batch, *sizes[1:]], dtype=types[value.type])
        return past


class TransformersSubject:
    """A merged checkpoint, loaded by transformers as its users load it, but in float32."""

    def __init__(self, folder: Path, threads: int | None, task: str = GENERATION) -> None:
        import torch

        from adaptrix_export.check.reference import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = load_model(folder, task=task)

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        from adaptrix_export.check.reference import encode

        return encode(self._model, ids, mask, types)

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                past_key_values=cache,
                use_cache=True,
            )
        return cast(Logits, out.logits.float().numpy()), out.past_key_values


def open_subject(job: Job) -> Subject:
    """The artifact of `job` in its runtime."""
    if job.target == "onnx":
        return OnnxSubject(job.artifact, job.threads)
    return TransformersSubject(job.artifact, job.threads, job.task)
