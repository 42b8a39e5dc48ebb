"""What a session has done: requests, switches and what its adapters take. Safe from any thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adaptrix_export.runtime.adapters import Loaded, log

BASE = "base"  # what requests without an adapter are counted under
MERGED = "merged"  # and those of a graph that has its adapters in its weights
OTHERS = "others"  # and those of all further labels, once there are so many:
MOST_LABELS = 1000  # of adapters, mixes and rows; a weight may be any number


class Statistics:
    """Counters. The lock is held for an addition, never while a graph runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._switches: list[float] = [0, 0.0, 0.0, 0.0]  # number, total, longest, last seconds

    def request(self, label: str) -> None:
        with self._lock:
            self._requests[_kept(label, self._requests)] += 1
        log.debug("request on %s", label)

    def tokens(self, label: str, count: int) -> None:
        with self._lock:
            self._tokens[_kept(label, self._tokens)] += count

    def switch(self, label: str, seconds: float) -> None:
        with self._lock:
            number, total, longest, _ = self._switches
            self._switches = [number + 1, total + seconds, max(longest, seconds), seconds]
        log.info("switched to %s in %.3f ms", label, 1e3 * seconds)

    def as_dict(self, loaded: Mapping[str, Loaded], active: str) -> dict[str, Any]:
        """`active`, `adapters` (bytes, rank, load_ms of each), `requests` and `tokens` by adapter
        or mix, the first 1000 of them by name, `switches` (number, mean_ms, max_ms, last_ms)."""
        with self._lock:
            requests, tokens = dict(self._requests), dict(self._tokens)
            number, total, longest, last = self._switches
        return {
            "active": active,
            "adapters": {
                name: {"bytes": a.bytes, "rank": a.rank, "load_ms": round(1e3 * a.seconds, 3)}
                for name, a in sorted(loaded.items())
            },
            "requests": requests,
            "tokens": tokens,
            "switches": {
                "number": int(number),
                "mean_ms": round(1e3 * total / number, 4) if number else 0.0,
                "max_ms": round(1e3 * longest, 4),
                "last_ms": round(1e3 * last, 4),
            },
        }


def _kept(label: str, counts: Counter[str]) -> str:
    """What to count under, so that counters do not grow with the mixes that people ask for."""
    return label if label in counts or len(counts) < MOST_LABELS else OTHERS
