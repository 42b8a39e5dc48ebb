"""Generation from an artifact folder with ONNX Runtime alone: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.graph import DecoderGraph, Ids
from adaptrix_export.runtime.tokenizer import TextTokenizer


class Session:
    """A published ONNX artifact, ready to generate greedily.

    Raises SourceError if `folder` is not an artifact, here or at the first use of a part that it
    lacks. `threads` is the number that ONNX Runtime works with, 0 for its own choice.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(str(folder), "no such folder", "an ONNX artifact folder")
        self._graph = DecoderGraph(self.folder, threads)
        self.eos_ids = self._read_eos_ids()
        self.context_length = self._read_context_length()

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.folder)

    def logits(self, input_ids: Ids, attention_mask: Ids | None = None) -> NDArray[np.float32]:
        """Logits (batch, seq, vocab) of one pass over `input_ids` (batch, seq), padded or not."""
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        values, _ = self._graph.step(ids, mask, self._graph.start(ids.shape[0]))
        return values.astype(np.float32, copy=False)

    def generate_ids(
        self, input_ids: Sequence[int], max_new_tokens: int, stop_at_eos: bool = True
    ) -> list[int]:
        """The new ids only, greedily chosen; the end token that stopped it is the last of them.

        Fewer than `max_new_tokens` where the context ends first.
        """
        return list(self._choose(input_ids, max_new_tokens, stop_at_eos))

    def stream(self, prompt: str, max_new_tokens: int = 128, chat: bool = False) -> Iterator[str]:
        """The answer to `prompt`, piece by piece. With `chat`, the model's chat template is used.

        Raises SourceError before the first piece for an empty prompt, one that is longer than
        the context, or a missing tokenizer or template.
        """
        if not prompt:
            raise SourceError("prompt", "empty", "some text")
        ids = self.tokenizer.encode_chat(prompt) if chat else self.tokenizer.encode(prompt)
        self._check_prompt(ids)
        return self.tokenizer.stream(ids, self._choose(ids, max_new_tokens, True))

    def generate(self, prompt: str, max_new_tokens: int = 128, chat: bool = False) -> str:
        """All of `stream` at once."""
        return "".join(self.stream(prompt, max_new_tokens, chat))

    def _choose(self, prompt: Sequence[int], count: int, stop_at_eos: bool) -> Iterator[int]:
        """Prefill once, then one token a step over the cache."""
        self._check_prompt(prompt)
        if self.context_length is not None:
            count = min(count, self.context_length - len(prompt))
        state = self._graph.start()
        fed: Sequence[int] = prompt
        for _ in range(count):
            # Without padding the mask is all ones, as long as all that was fed so far.
            mask = np.ones((1, state.length + len(fed)), dtype=np.int64)
            logits, state = self._graph.step(np.array([fed], dtype=np.int64), mask, state)
            chosen = int(np.argmax(logits[0, -1]))
            yield chosen
            if stop_at_eos and chosen in self.eos_ids:
                return
            fed = (chosen,)

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not self._graph.has_cache:
            raise SourceError(str(self.folder), "a graph without a cache", "past_key_values inputs")
        if not len(ids):
            raise SourceError("prompt", "no tokens", "at least one")
        if self.context_length is not None and len(ids) > self.context_length:
            raise SourceError(
                "prompt",
                f"{len(ids)} tokens",
                f"at most {self.context_length}",
                "shorten it",
            )

    def _read_eos_ids(self) -> frozenset[int]:
        """From generation_config.json, which may know more end tokens than config.json."""
        for name in ("generation_config.json", "config.json"):
            eos = self._read(name).get("eos_token_id")
            if eos is not None:
                return frozenset(eos) if isinstance(eos, list) else frozenset({int(eos)})
        return frozenset()

    def _read_context_length(self) -> int | None:
        length = self._read("genai_config.json").get("model", {}).get("context_length")
        return int(length) if length is not None else None

    def _read(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files; empty where a folder does without it."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(str(path), f"not JSON ({error})", "a JSON object") from error
        return content
