"""A process that has imported everything and forks for each command: python -m tests.trust.forks.

It has one thread and has run nothing, so that a fork of it is as good as a fresh process, and costs
no imports. A question is a line of JSON (program, arguments, environment, folder); the answer is a
line with the exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.trust import measured

SAID = ".said"  # in the folder of a command: its standard error


class Forks:
    """Context manager over one such process."""

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trust.forks"], cwd=measured.ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=measured.environment(),
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self, program: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> tuple[int, str]:
        """Exit code and standard error of `program`, as `python -c` would run it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {"program": program, "arguments": list(arguments), "folder": str(folder),
                    "environment": dict(environment)}  # fmt: skip
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        said = folder / SAID
        text = said.read_text(errors="replace").strip()
        said.unlink()
        return code, text


def _become(question: Mapping[str, Any]) -> None:
    """Run a program in this process, which then ends."""
    os.environ.update(question["environment"])
    os.chdir(question["folder"])
    said = os.open(SAID, os.O_CREAT | os.O_WRONLY, 0o644)
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, nothing), (1, nothing), (2, said)):
        os.dup2(source, target)
    sys.argv = ["-c", *question["arguments"]]
    code = 1
    try:
        exec(compile(question["program"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # as the interpreter itself does
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def serve() -> None:
    import mobius
    import onnx_ir
    import onnxscript
    import peft
    import torch
    import transformers

    import adaptrix_export.cli
    import adaptrix_export.manage.add_adapter
    import adaptrix_export.pipeline

    loaded = (mobius, onnx_ir, onnxscript, peft, torch, transformers, adaptrix_export)
    assert all(loaded) and _threads() == 1, f"{_threads()} threads: a fork would lack some"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
