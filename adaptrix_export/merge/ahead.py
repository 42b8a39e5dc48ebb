"""Runs tasks in threads ahead of the consumer of their results, in order.

numpy releases the interpreter lock, so two threads use two cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")

MOST = 4  # threads; with more, writing to disk is the bottleneck


def ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of `tasks`, in order. `tasks` is iterated in the caller's thread, a few ahead."""
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(_pool().submit(task))
            if len(waiting) > workers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@cache
def workers() -> int:
    """Number of threads: one for each core that this process may use, at most MOST."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST, cores or 1))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers(), thread_name_prefix="merge")
