"""Pieces of work done by threads ahead of whoever takes their results, in order.

numpy works free of the interpreter lock, so two threads keep two cores busy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")

MOST = 4  # threads; a disk takes no more than they make


def ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of `tasks`, in order. Tasks are drawn in the caller's thread, a few early."""
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
    """How many threads: one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST, cores or 1))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers(), thread_name_prefix="merge")
