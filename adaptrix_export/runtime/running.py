"""One request on a graph: its buffers, bound once, and the cache that grows in place.

Requests share the ONNX Runtime session, which runs any number of them at once, and nothing else:
each has its own binding. What a step changes is the new ids, the mask, and nothing more, where the
graph keeps its cache in place; the factors of the request's adapter stay bound throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.runtime.graph import ADAPTER_IDS, LOGITS, DecoderGraph, Ids

Scores = NDArray[np.floating[Any]]


class Run:
    """A batch of `batch` rows, at most `capacity` tokens each, padding included.

    `factors` are the request's adapter: input name -> ONNX Runtime value. `adapter_ids` (batch,)
    chooses an adapter for each row where the graph takes that.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        batch: int,
        capacity: int,
        factors: Mapping[str, Any],
        adapter_ids: Ids | None = None,
    ) -> None:
        import onnxruntime

        self._graph, self._batch = graph, batch
        self._values = onnxruntime.OrtValue
        self._device = graph.provider.device
        self._binding = graph.session.io_binding()
        self._kept: dict[str, Any] = {}  # ONNX Runtime does not own what is bound
        self._logits: Any = None
        self.length = 0
        for name, value in factors.items():
            self._bind(name, value)
        if adapter_ids is not None:
            self._feed(ADAPTER_IDS, adapter_ids)
        self._ids = np.empty((batch, 1), dtype=np.int64)
        for slot in graph.cache:
            tokens = capacity if graph.shares_cache else 0
            shape = [batch, slot.heads, tokens, slot.size]
            value = self._values.ortvalue_from_shape_and_type(shape, slot.element, self._device, 0)
            self._bind(slot.past, value)
            if graph.shares_cache:  # one buffer for what goes in and what comes out
                self._binding.bind_ortvalue_output(slot.present, value)

    def step(self, ids: Ids, mask: Ids) -> Scores:
        """Logits (batch, seq, vocab) of `ids` (batch, seq) behind what went before.

        `mask` is (batch, all tokens so far), 0 at pads. The logits are overwritten by the next
        step of as many tokens: copy what is to stay.
        """
        graph, binding = self._graph, self._binding
        if ids.shape[1] == 1 and self._device == "cpu":
            self._ids[:] = ids  # the buffer is bound already, after the first such step
            if self._kept.get("input_ids") is None or self._kept["input_ids"][1] is not self._ids:
                self._feed("input_ids", self._ids)
        else:
            self._feed("input_ids", ids)
        self._feed("attention_mask", mask)
        if graph.takes_positions:
            # As transformers counts: pads have no position, whichever side they stand on.
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            self._feed("position_ids", positions[:, self.length :])
        self._expect_logits(ids.shape[1])
        if not graph.shares_cache:
            for slot in graph.cache:
                binding.bind_output(slot.present, self._device)
        graph.session.run_with_iobinding(binding)
        self.length = mask.shape[1]
        return self._collect()

    def forget(self, length: int) -> None:
        """Go back to the first `length` tokens: the next step writes over the others."""
        self.length = length

    def _expect_logits(self, tokens: int) -> None:
        """A buffer for the logits, kept while its size fits; ONNX Runtime's own if unknown."""
        if self._graph.vocabulary is None:
            self._binding.bind_output(LOGITS)
            return
        shape = [self._batch, tokens, self._graph.vocabulary]
        if self._logits is None or self._logits.shape() != shape:
            kind = self._graph.logit_type
            self._logits = self._values.ortvalue_from_shape_and_type(shape, kind)
            self._binding.bind_ortvalue_output(LOGITS, self._logits)

    def _collect(self) -> Scores:
        """The logits; and the cache goes from output to input as it is, never through numpy."""
        logits = self._logits
        if logits is None or not self._graph.shares_cache:
            made = dict(zip(self._names(), self._binding.get_outputs(), strict=True))
            logits = made[LOGITS]
            for slot in () if self._graph.shares_cache else self._graph.cache:
                self._bind(slot.past, made[slot.present])
        values: Scores = logits.numpy()
        return values

    def _names(self) -> list[str]:
        """Outputs in the order in which they were bound first, which is how they come back."""
        presents = [slot.present for slot in self._graph.cache]
        return [*presents, LOGITS] if self._graph.shares_cache else [LOGITS, *presents]

    def _feed(self, name: str, array: Ids) -> None:
        whole = np.ascontiguousarray(array, dtype=np.int64)
        value = self._values.ortvalue_from_numpy(whole, self._device, 0)
        self._binding.bind_ortvalue_input(name, value)
        self._kept[name] = (value, whole)

    def _bind(self, name: str, value: Any) -> None:
        self._binding.bind_ortvalue_input(name, value)
        self._kept[name] = (value, None)
