"""Generation from an artifact folder with ONNX Runtime alone: no torch, no transformers.

    session = Session("./artifact")
    session.use("sql")                                   # requests from now on
    session.generate("Show all users", adapter="poems")  # this request only
    session.use({"sql": 0.7, "poems": 0.3})

One session serves any number of threads. A request keeps the adapter that it started with, and
no lock is held while a graph runs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.adapters import SUFFIX, AdapterStore, listed
from adaptrix_export.runtime.context import SiteStatistics, context_statistics
from adaptrix_export.runtime.files import ArtifactFiles
from adaptrix_export.runtime.graph import GRAPH, SLOTLESS, DecoderGraph, Ids
from adaptrix_export.runtime.guided import guided
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.padding import padded
from adaptrix_export.runtime.providers import AUTO
from adaptrix_export.runtime.requests import attention_mask as mask_of
from adaptrix_export.runtime.requests import (
    fits_context,
    path_of,
    prompt_rows,
    shown,
    stop_ids,
    text,
    token_ids,
    whole_number,
)
from adaptrix_export.runtime.running import Run
from adaptrix_export.runtime.sampling import GREEDY, Sampler, Sampling
from adaptrix_export.runtime.selection import Choice, Selection, resolved
from adaptrix_export.runtime.settings import read_context_length, read_eos_ids
from adaptrix_export.runtime.statistics import MERGED, Statistics
from adaptrix_export.runtime.tokenizer import TextTokenizer


class Current(Enum):
    """In place of a selection: whatever `use` chose last. No name of an adapter can mean this."""

    CURRENT = "current"


CURRENT = Current.CURRENT


class Session:
    """A published ONNX artifact, ready to generate.

    Raises SourceError if `folder` is not an artifact, here or at the first use of a part that it
    lacks. `threads` is the number that ONNX Runtime works with, 0 for its own choice; `provider`
    is auto (the best there is), cpu or cuda. The artifact's adapters are loaded and checked here.

    With `twin`, requests without an adapter run on a second graph over the same weights file, one
    without slots: they cost what they would if there were none, and ONNX Runtime holds the weights
    of both graphs in memory. Only an artifact with slots has it.

    Every file that is read is compared with the manifest first, the weights while ONNX Runtime
    loads them; `check=False` leaves that out.
    """

    def __init__(
        self, folder: Path | str, threads: int = 0, provider: str = AUTO, twin: bool = False,
        check: bool = True,
    ) -> None:  # fmt: skip
        self.folder = path_of("folder", folder)
        if not self.folder.is_dir():
            raise SourceError(str(folder), "no such folder", "an ONNX artifact folder")
        threads = whole_number("threads", threads)
        self._files = ArtifactFiles(self.folder, check)
        self._files.require(self.folder / "config.json")
        graphs = [located(self.folder, file) for file in (GRAPH, *((SLOTLESS,) if twin else ()))]
        with self._files.requiring(path for path in graphs if path.is_file()):
            self._graph = DecoderGraph(self.folder, threads, provider)
            self._twin = DecoderGraph(self.folder, threads, provider, SLOTLESS) if twin else None
        self._store = AdapterStore(self._graph)
        self._statistics = Statistics()
        self._current = Choice()
        self.eos_ids = read_eos_ids(self._files)
        self.context_length = read_context_length(self._files)
        if self._graph.slots:
            for name, path in listed(self._files).items():
                self._store.load(self._files.require(path), name)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.folder, self._files)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that `use` and `adapter=` take."""
        return self._graph.rows or tuple(sorted(self._store.loaded))

    @property
    def provider(self) -> str:
        """The execution provider that the graph runs on, as ONNX Runtime names it."""
        return self._graph.provider.name

    def load_adapter(self, path: Path | str, name: str | None = None) -> str:
        """Add an `.onnx_adapter` file that was made for this artifact; returns its name."""
        path = path_of("adapter", path)
        name = path.name.removesuffix(SUFFIX) if name is None else text("name of the adapter", name)
        self._store.load(path, name)
        return name

    def use(self, adapter: Selection) -> None:
        """Choose for requests that start from now on: a name, a mix {name: weight}, or None.

        With `rows: true`, also a name or None for each row. Running requests go on as they began.
        """
        start = time.perf_counter()
        choice = resolved(adapter, self._graph, self._store)
        self._current = choice  # one assignment: a request sees the old one or the new one
        self._statistics.switch(choice.label, time.perf_counter() - start)

    def stats(self) -> dict[str, Any]:
        """Requests, switch times and memory of adapters; see `Statistics.as_dict`."""
        return self._statistics.as_dict(self._store.loaded, self._label(self._current))

    def context(
        self, ids: Sequence[int], adapter: Selection | Current = CURRENT
    ) -> list[SiteStatistics]:
        """How far the gates of context preservation are open over these tokens, site by site.

        Raises SourceError for an artifact that was not built with context.stats.
        """
        (row,) = prompt_rows([ids], self._graph.vocabulary, self.context_length)
        return context_statistics(self._files, self._graph, self._chosen(adapter), row)

    def logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        adapter: Selection | Current = CURRENT,
    ) -> NDArray[np.float32]:
        """Logits (batch, seq, vocab) of one pass over `input_ids` (batch, seq), padded or not.

        Raises SourceError for ids outside of the vocabulary, and other shapes and types.
        """
        ids = token_ids("input_ids", input_ids, self._graph.vocabulary, dimensions=2)
        if not ids.size:
            raise SourceError("input_ids", f"shape {list(ids.shape)}", "at least one token")
        mask = np.ones_like(ids) if attention_mask is None else mask_of(attention_mask, ids)
        fits_context("input_ids", int(mask.sum(axis=1).max()), self.context_length)
        run, _ = self._start(self._chosen(adapter), ids.shape[0], ids.shape[1])
        return run.step(ids, mask).astype(np.float32, copy=False)

    def generate_ids(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        stop_at_eos: bool = True,
        *,
        adapter: Selection | Current = CURRENT,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
    ) -> list[int]:
        """The new ids only; the end token, or the one of `stop`, that stopped it is the last.

        Fewer than `max_new_tokens` where the context ends first.
        """
        return self.generate_batch(
            [input_ids], max_new_tokens, stop_at_eos, adapter=adapter, sampling=sampling, stop=stop
        )[0]

    def generate_batch(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_at_eos: bool = True,
        *,
        adapter: Selection | Current = CURRENT,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
        padding: str = "left",
    ) -> list[list[int]]:
        """`generate_ids` of several prompts at once, padded on either side.

        Each row gets what it would get alone; a row that has ended no longer grows. The context
        is that of the longest row.
        """
        ends = self._ends(stop_at_eos, stop)
        steps = self._decode(rows, max_new_tokens, ends, adapter, sampling, padding)
        answers: list[list[int]] = [[] for _ in rows]
        for tokens in steps:
            for row, token in zip(answers, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return answers

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        chat: bool = False,
        *,
        adapter: Selection | Current = CURRENT,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
    ) -> Iterator[str]:
        """The answer to `prompt`, piece by piece. With `chat`, the model's chat template is used.

        Raises SourceError before the first piece for an empty prompt, one that is longer than
        the context, or a missing tokenizer or template. The adapter is the one of this call.
        """
        ids = self._encoded(prompt, chat)
        ends = self._ends(True, stop)
        steps = self._decode([ids], max_new_tokens, ends, adapter, sampling, "left")
        return self.tokenizer.stream(ids, (token for (token,) in steps if token is not None))

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., chat: bool = ..., **how: Any
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Sequence[str], max_new_tokens: int = ..., chat: bool = ..., **how: Any
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 128,
        chat: bool = False,
        **how: Any,
    ) -> str | list[str]:
        """All of `stream` at once; several prompts are one batch.

        `how` are the keywords of `stream`, and `padding` for a batch.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, max_new_tokens, chat, **how))
        if not isinstance(prompt, Sequence):
            raise SourceError("prompt", shown(prompt), "some text, or a list of texts")
        prompts = [self._encoded(each, chat) for each in prompt]
        answers = self.generate_batch(prompts, max_new_tokens, **how)
        words = self.tokenizer
        return ["".join(words.stream(a, b)) for a, b in zip(prompts, answers, strict=True)]

    def _encoded(self, prompt: str, chat: bool) -> list[int]:
        words = text("prompt", prompt)
        return self.tokenizer.encode_chat(words) if chat else self.tokenizer.encode(words)

    def _ends(self, stop_at_eos: bool, stop: Collection[int]) -> frozenset[int]:
        return stop_ids(stop) | (self.eos_ids if stop_at_eos else frozenset())

    def _chosen(self, adapter: Selection | Current) -> Choice:
        if isinstance(adapter, Current):
            return self._current
        return resolved(adapter, self._graph, self._store)

    def _label(self, choice: Choice) -> str:
        """What statistics call it: a graph without slots and rows never runs the base alone."""
        switchable = self._graph.slots or self._graph.rows
        return choice.label if switchable else MERGED

    def _start(self, choice: Choice, batch: int, capacity: int) -> tuple[Run, str]:
        ids = choice.row_ids(batch) if self._graph.takes_ids else None
        self._statistics.request(self._label(choice))
        factors = choice.factors()
        graph = self._graph if factors or self._twin is None else self._twin
        return Run(graph, batch, capacity, factors, ids), self._label(choice)

    def _decode(
        self,
        rows: Sequence[Sequence[int]],
        count: int,
        ends: frozenset[int],
        adapter: Selection | Current,
        sampling: Sampling,
        side: str,
    ) -> Iterator[list[int | None]]:
        """A token a row and step, None for rows that have ended. All checks happen before."""
        if not self._graph.cache:
            raise SourceError(str(self.folder), "a graph without a cache", "past_key_values inputs")
        rows = prompt_rows(rows, self._graph.vocabulary, self.context_length)
        count = whole_number("max_new_tokens", count)
        longest = max(len(row) for row in rows)
        if self.context_length is not None:
            count = min(count, self.context_length - longest)
        if sampling.lookup and (len(rows) > 1 or not self._graph.shares_cache):
            raise SourceError(
                "lookup", f"{len(rows)} prompts" if len(rows) > 1 else "a cache of another kind",
                "one prompt, and a graph that updates its cache in place", "leave lookup out",
            )  # fmt: skip
        ids, mask, last = padded(rows, side, max(count, 0))
        run, label = self._start(self._chosen(adapter), len(rows), mask.shape[1])
        samplers = [Sampler(sampling, row, place) for place, row in enumerate(rows)]
        if sampling.lookup:
            tokens = guided(run, rows[0], samplers[0], sampling.lookup, count, ends)
            return self._counted(label, tokens)
        return self._steps(run, label, (ids, mask, last), samplers, count, ends)

    def _counted(self, label: str, tokens: Iterator[int]) -> Iterator[list[int | None]]:
        """The tokens of one row, counted in the statistics."""
        made = 0
        try:
            for token in tokens:
                made += 1
                yield [token]
        finally:
            self._statistics.tokens(label, made)

    def _steps(
        self,
        run: Run,
        label: str,
        prompt: tuple[Ids, Ids, Ids],
        samplers: list[Sampler],
        count: int,
        ends: frozenset[int],
    ) -> Iterator[list[int | None]]:
        """Prefill once, then one token a row and step over the cache, until every row has ended."""
        fed, mask, last = prompt
        going = [True] * len(samplers)
        made = 0
        try:
            for _ in range(count):
                logits = run.step(fed, mask[:, : run.length + fed.shape[1]])
                fed = np.zeros((len(samplers), 1), dtype=np.int64)
                tokens: list[int | None] = [None] * len(samplers)
                for row, sampler in enumerate(samplers):
                    if going[row]:
                        token = sampler.choose(logits[row, last[row]])
                        fed[row, 0] = tokens[row] = token
                        going[row] = token not in ends
                        made += 1
                last = np.zeros_like(last)
                yield tokens
                if not any(going):
                    return
        finally:
            self._statistics.tokens(label, made)
