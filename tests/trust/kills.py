"""Kills at chosen points of a command, in a forked process: an audit hook ends it without mercy.

The points are calls that touch files (opening, renaming, removing, making folders), spread
evenly over all that the command makes, so every kill lies at another step of its work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

EVENTS = frozenset(
    "open os.rename os.remove os.mkdir os.rmdir os.chmod os.truncate shutil.copyfile "
    "shutil.rmtree os.scandir".split()
)
KILLED, DONE, FAILED = 9, 0, 7


def run(command: Callable[[], object], stop_at: int | None) -> tuple[int, int]:
    """(exit status, events) of `command` in a fork that ends at event `stop_at`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _as_child(command, stop_at, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def _as_child(command: Callable[[], object], stop_at: int | None, writing: int) -> None:
    """Never returns."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == stop_at:
                os._exit(KILLED)

    status = FAILED
    try:
        sys.addaudithook(hook)
        command()
        status = DONE
    finally:
        os.write(writing, str(count).encode())
        os._exit(status)


def points(command: Callable[[], object], number: int) -> Iterator[int]:
    """`number` events spread over a whole run, the last ones among them: that is where it moves."""
    status, total = run(command, None)
    assert status == DONE, f"the command failed by itself ({status})"
    late = set(range(max(1, total - number // 2), total + 1))
    rest = max(1, total // (number - len(late) + 1) or 1)
    yield from sorted(late | set(range(1, total - number // 2, rest)))
