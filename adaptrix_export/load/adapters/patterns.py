"""Patterns in an adapter's config, matched with a limit: they are regexes of strangers.

A recursive or very long one takes seconds and hundreds of megabytes to compile, a nested one for
ever to match; and many that are quick take long together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import regex

from adaptrix_export.errors import AdapterError

LONGEST_PATTERN = 20_000  # characters; compiling takes some hundred bytes for each
PATTERN_SECONDS = 1.0  # for one match
SECONDS = 4.0  # for all of an adapter
_PLAIN = regex.compile(r"[\w.]+")
KEPT = 64  # patterns that stay compiled: one of 50 characters can take a megabyte


@dataclass
class _Budget:
    seconds: float
    patterns: set[str] = field(default_factory=set)

    def compile_another(self, pattern: str) -> None:
        if pattern not in self.patterns and len(self.patterns) == KEPT:
            regex.purge()
            self.patterns.clear()
        self.patterns.add(pattern)


_budget: ContextVar[_Budget] = ContextVar("adaptrix_patterns")


@contextmanager
def limited_patterns() -> Iterator[None]:
    """All matches in the block take SECONDS together, or AdapterError is raised."""
    token = _budget.set(_Budget(SECONDS))
    try:
        yield
    finally:
        _budget.reset(token)


def search(place: str, form: Callable[..., Any], template: str, pattern: str, path: str) -> Any:
    """`form` (regex.match or regex.fullmatch) of `template % pattern` on `path`.

    Raises AdapterError at `place` for a pattern that is none, or that takes too long.
    """
    if len(pattern) > LONGEST_PATTERN or "(?R" in pattern:
        raise AdapterError(
            place, f"a pattern of {len(pattern)} characters, or a recursive one",
            f"at most {LONGEST_PATTERN}", "name the modules plainly",
        )  # fmt: skip
    budget = _budget.get(_Budget(PATTERN_SECONDS))
    start = time.monotonic()
    try:
        budget.compile_another(pattern)
        if budget.seconds <= 0:
            raise TimeoutError("the patterns of this adapter take too long")
        limit = max(0.01, min(PATTERN_SECONDS, budget.seconds))
        return form(template % pattern, path, timeout=limit)
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise AdapterError(
            place, f"pattern {pattern[:200]!r} ({error or 'took too long'})",
            "a regular expression", "name the modules plainly",
        ) from error  # fmt: skip
    finally:
        budget.seconds -= time.monotonic() - start


def ends_with(pattern: str, path: str) -> bool | None:
    """Whether `(.*\\.)?(pattern)$` matches, for a plain name; None for any other pattern."""
    if not _PLAIN.fullmatch(pattern):
        return None
    head = path[: -len(pattern)]
    if len(pattern) > len(path) or (head and not head.endswith(".")):
        return False
    tail = path[len(head) :]
    return pattern == tail or all(p in (".", t) for p, t in zip(pattern, tail, strict=True))
