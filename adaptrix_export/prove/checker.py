"""The checking process, as its parent sees it: started once, asked as often as there is need.

A session of ONNX Runtime can take its process down, and two models want memory that the compiler
should not keep; so nothing here imports torch, and a crash becomes an error with a name. Starting
early pays: the imports of the process, seconds of them, then overlap with whatever the parent does.
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
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from adaptrix_export import errors
from adaptrix_export.errors import AdaptrixError, CheckerError, MachineError
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.progress import Advance, Progress
from adaptrix_export.prove.lifetime import PARENT

MODULE = "adaptrix_export.prove.serve"
LAST_LINES = 5
END_S = 5.0  # what a process that is crashing may take for it

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
ROOM = 1 << 16  # bytes: with less in the temporary folder a report cannot be written


def ask(
    kind: str, text: str, progress: Progress, timeout_s: float, checker: Checker | None = None
) -> dict[str, Any]:
    """`checker.ask`; without a checker, of one that is started for this question alone."""
    if checker is not None:
        return checker.ask(kind, text, progress, timeout_s)
    with Checker() as own:
        return own.ask(kind, text, progress, timeout_s)


class Checker:
    """Context manager over one `python -m module`, which ends with it.

    `start` is for those who know that they will ask; otherwise the first `ask` starts the process.
    One that crashed is started anew by the next `ask`.
    """

    def __init__(self, module: str | None = None) -> None:
        self._module = module or MODULE
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Checker:
        self._scratch = scratch_folder("check")
        self._folder = self._scratch.__enter__()
        (self._folder / "empty").mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._scratch.__exit__(None, None, None)

    def start(self) -> None:
        """Start the process, which imports what it needs; does nothing where it runs already."""
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        with (self._folder / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                cwd=self._folder / "empty",  # python -m looks there first, not where the user is
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
            )

    def ask(self, kind: str, text: str, progress: Progress, timeout_s: float) -> dict[str, Any]:
        """The report that a kind of job (a row of `serve.RUNNERS`) makes of `text`.

        Raises the process's own error, and CheckerError when it left neither: it crashed, was
        killed, or ran past `timeout_s`.
        """
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="ask-") as scratch:
            folder = Path(scratch)
            (folder / "job.json").write_text(text, encoding="utf-8")
            self.start()
            late = self._answered(
                json.dumps({"kind": kind, "folder": scratch}), progress, timeout_s
            )
            report = folder / "report.json"
            if late or not report.is_file():
                raise self._crash(late, timeout_s)
            document = json.loads(report.read_text(encoding="utf-8"))
        if "error" in document:
            raise _error_of(document["error"])
        answer: dict[str, Any] = document["report"]
        return answer

    def _answered(self, question: str, progress: Progress, timeout_s: float) -> bool:
        """Waits for the answer to a question; whether the time ran out."""
        process, late = self._process, threading.Event()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None

        def expire() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(timeout_s, expire)
        watchdog.start()
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            _follow(process.stdout, progress)
        except BrokenPipeError:
            pass  # it has ended; what it left says how
        except BaseException:  # nobody will read its answer
            process.kill()
            raise
        finally:
            watchdog.cancel()
        return late.is_set()

    def _crash(self, late: bool, timeout_s: float) -> CheckerError:
        """What became of a process that left no report: the machine's fault, whatever it was."""
        code = self._end(patience_s=END_S)
        if late:
            how = f"ran past {timeout_s:g} s and was stopped"
        elif code < 0:
            how = f"was killed by {_signal_name(-code)}"
        else:
            how = f"ended with exit code {code} and no report"
        stderr = self._folder / "stderr"
        lines = stderr.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = " | ".join(line.strip() for line in lines[-LAST_LINES:])
        error = CheckerError(
            "parity", f"the checking process {how}: {last}", "a report",
            _remedy(code, late, self._folder),
        )  # fmt: skip
        error.crashed = -code in CRASHES and not late
        return error

    def _end(self, patience_s: float = 0.0) -> int:
        """End the process, where it does not end by itself; its exit code, 0 where none is."""
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()  # what it was asked for is answered, or not wanted any more
            process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # a question that it did not read
                stream.close()
        return process.returncode


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
    """Replays the child's progress lines on the parent's `Progress`, stage by stage, to the end of
    its work or of itself."""
    stage: AbstractContextManager[Advance] | None = None
    advance: Advance = _unheard
    try:
        for line in iter(lines.readline, ""):
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
            elif event["event"] == "done":
                break
    finally:
        if stage is not None:  # the child died inside a stage
            stage.__exit__(None, None, None)


def _unheard(amount: int) -> None:
    return None


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
