"""Decode and prefill of several graphs through this package's runtime, in turns.

The graphs take turns in an order that changes with every step, medians are compared, and time is
the thread's own, so that a busy machine slows all of them alike. Where a session's weights happen
to lie in memory makes up to a tenth of a difference, so all sessions are opened several times.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 24  # tokens decoded after a prefill


class Timed:
    """A graph with one choice of adapters: prefill and decode times of its own runs, over however
    many sessions are given to it, one after the other."""

    def __init__(
        self, folder: Path, adapter: Any = None, batch: int = 1, twin: bool = False
    ) -> None:
        self.folder, self.adapter, self.batch, self.twin = folder, adapter, batch, twin
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.session: Any = None
        self.run: Any = None
        self.counts = False

    def start(self, tokens: int) -> None:
        choice = self.session._chosen(self.adapter)
        self.run, _ = self.session._start(choice, self.batch, tokens + STEPS)
        ids = np.arange(100, 100 + tokens)[None].repeat(self.batch, 0)
        self._timed(self.prefill, ids, np.ones_like(ids))

    def step(self, token: int) -> None:
        mask = np.ones((self.batch, self.run.length + 1), np.int64)
        self._timed(self.decode, np.full((self.batch, 1), token, np.int64), mask)

    def _timed(self, times: list[float], ids: Any, mask: Any) -> None:
        begin = time.thread_time()  # ONNX Runtime's one thread is this one
        self.run.step(ids, mask)
        if self.counts:
            times.append(time.thread_time() - begin)

    def figures(self) -> tuple[float, float, float]:
        """Seconds: medians of prefill and decode, and what the best tenth of decode steps took.

        The last is the cost itself where others use the memory at the same time.
        """
        best = statistics.quantiles(self.decode, n=10)[0]
        return statistics.median(self.prefill), statistics.median(self.decode), best


def interleaved(
    cases: dict[str, Timed], sessions: int, runs: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Figures in ms, and as a ratio to the first case."""
    for number in range(sessions):
        order = list(cases.values())
        order = order[number % len(order) :] + order[: number % len(order)]
        one_session_each(order, runs, tokens, random.Random(number).shuffle)
    names = ("prefill", "decode", "decode_best")
    first = next(iter(cases.values())).figures()
    found: dict[str, dict[str, float]] = {}
    for label, case in cases.items():
        row = found[label] = {}
        for name, seconds, start in zip(names, case.figures(), first, strict=True):
            row[f"{name}_ms"] = round(1e3 * seconds, 3)
            row[f"{name}_ratio"] = round(seconds / start, 4)
    return found


def one_session_each(order: list[Timed], runs: int, tokens: int, shuffle: Any) -> None:
    """`runs` of each, after one that warms everything up and is not counted."""
    from adaptrix_export.runtime import Session

    for case in order:
        case.session = Session(case.folder, threads=1, twin=case.twin)
    for turn in range(runs + 1):
        shuffle(order)
        for case in order:
            case.counts = turn > 0
            case.start(tokens)
        for token in range(STEPS):
            shuffle(order)
            for case in order:
                case.step(200 + token)
    for case in order:
        case.session = case.run = None
    gc.collect()
