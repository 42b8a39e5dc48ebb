"""Proves an artifact against its oracle, in a child process.

A session of ONNX Runtime can take its process down, and two models want memory that the compiler
should not keep; so nothing here imports torch, and a crash becomes an error with a name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from adaptrix_export import errors
from adaptrix_export.errors import AdaptrixError, CheckerError, MachineError
from adaptrix_export.oracle.job import Job
from adaptrix_export.progress import Advance, Progress
from adaptrix_export.prove.lifetime import PARENT

CHILD = "adaptrix_export.prove.child"
TIMEOUT_S = 2 * 3600.0  # a 7B model on a few cores takes tens of minutes
LAST_LINES = 5

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
ROOM = 1 << 16  # bytes: with less in the temporary folder a report cannot be written


def prove(job: Job, progress: Progress, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The parity report of `job`, passed or not (`report["passed"]`).

    Raises `ParityError` when the oracle could not be trusted, `CheckerError` when the child
    crashed, was killed or ran past `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="adaptrix-parity-") as scratch:
        return run_child(CHILD, job.to_json(), Path(scratch), progress, timeout_s)


def run_child(
    module: str, job: str, folder: Path, progress: Progress, timeout_s: float
) -> dict[str, Any]:
    """The report of `python -m module job.json report.json`, run in the empty `folder`.

    Raises the child's own error, and CheckerError when it left neither.
    """
    (folder / "job.json").write_text(job, encoding="utf-8")
    with (folder / "stderr").open("wb") as stderr:
        code, late = _run(module, folder, stderr, progress, timeout_s)
    report = folder / "report.json"
    if code != 0 or late or not report.is_file():
        raise _crash(code, late, timeout_s, folder / "stderr")
    document = json.loads(report.read_text(encoding="utf-8"))
    if "error" in document:
        raise _error_of(document["error"])
    verdict: dict[str, Any] = document["report"]
    return verdict


def _run(
    module: str, folder: Path, stderr: IO[bytes], progress: Progress, timeout_s: float
) -> tuple[int, bool]:
    """Runs the child in its own empty folder: its exit code, and whether it was too late."""
    late = threading.Event()
    child = subprocess.Popen(
        [sys.executable, "-m", module, "job.json", "report.json"],
        cwd=folder,  # python -m looks there first: not at whatever lies where the user stands
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        encoding="utf-8",
    )

    def expire() -> None:
        late.set()
        child.kill()

    watchdog = threading.Timer(timeout_s, expire)
    watchdog.start()
    try:
        assert child.stdout is not None
        _follow(child.stdout, progress)
        return child.wait(), late.is_set()
    finally:
        watchdog.cancel()
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    # Everything is a local file by now; an adapter's config names a hub model that must not be
    # asked about, unless the user said so.
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env[PARENT] = str(os.getpid())
    # The same search path in the same order, so that the child runs this very package.
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    return env


def _follow(lines: IO[str], progress: Progress) -> None:
    """Replays the child's progress lines on the parent's `Progress`, stage by stage."""
    stage: AbstractContextManager[Advance] | None = None
    advance: Advance = _unheard
    try:
        for line in lines:
            if not line.endswith("\n"):
                break  # the child died in the middle of it
            event = json.loads(line)
            if event["event"] == "begin":
                stage = progress.stage(event["name"], event["total"], event["unit"])
                advance = stage.__enter__()
            elif event["event"] == "advance":
                advance(event["amount"])
            elif event["event"] == "end" and stage is not None:
                stage.__exit__(None, None, None)
                stage = None
            elif event["event"] == "note":
                progress.note(event["text"])
    finally:
        if stage is not None:  # the child died inside a stage
            stage.__exit__(None, None, None)


def _unheard(amount: int) -> None:
    return None


def _crash(code: int, late: bool, timeout_s: float, stderr: Path) -> CheckerError:
    """What became of a child that left no report: the machine's fault, whatever it was."""
    if late:
        how = f"ran past {timeout_s:g} s and was stopped"
    elif code < 0:
        how = f"was killed by {_signal_name(-code)}"
    else:
        how = f"ended with exit code {code} and no report"
    lines = stderr.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = " | ".join(line.strip() for line in lines[-LAST_LINES:])
    error = CheckerError(
        "parity", f"the checking process {how}: {last}", "a report",
        _remedy(code, late, stderr.parent),
    )  # fmt: skip
    error.crashed = -code in CRASHES and not late
    return error


def _remedy(code: int, late: bool, folder: Path) -> str:
    if late:
        return "give it a machine with more cores to itself, or --parity fast"
    if shutil.disk_usage(folder).free < ROOM:
        return f"{folder.parent} is full; free some space or set TMPDIR"
    return "was it out of memory?" if code == -signal.SIGKILL else ""


def _signal_name(number: int) -> str:
    known = {int(s): s.name for s in signal.Signals}
    return known.get(number, f"signal {number}")


def _error_of(parts: dict[str, str]) -> AdaptrixError:
    """The child's error, of the same class, so that the exit code is the same."""
    kind = getattr(errors, parts["error"], MachineError)
    error: AdaptrixError = kind(parts["place"], parts["found"], parts["expected"], parts["remedy"])
    return error
