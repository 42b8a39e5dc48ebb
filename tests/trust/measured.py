"""A command in a process of its own, with what it cost: seconds of processor and largest memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Leaves its largest memory in a file: what wait4 says of a child begins with its parent's.
MAIN = """
import atexit, os, re, sys
def note():
    with open("/proc/self/status") as status, open(os.environ["TRUST_PEAK"], "w") as peak:
        peak.write(re.search(r"VmHWM:\\s+(\\d+)", status.read()).group(1))
atexit.register(note)
from adaptrix_export.cli import main
main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Cost:
    """`seconds` of processor, its children included; `peak` of resident memory in bytes."""

    code: int
    said: str
    seconds: float
    peak: int


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": paths.strip(os.pathsep), **more}


def run(
    command: Sequence[str],
    folder: Path,
    timeout_s: float = 120.0,
    more: Mapping[str, str] | None = None,
    program: str = MAIN,
) -> Cost:
    """`adaptrix-export COMMAND...`, started in `folder`."""
    noted = folder / ".peak"
    child = subprocess.Popen(
        [sys.executable, "-c", program, *command], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment(**(more or {}), TRUST_PEAK=str(noted)),
    )  # fmt: skip
    watchdog = threading.Timer(timeout_s, child.kill)
    watchdog.start()
    try:
        assert child.stderr is not None
        said = child.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        watchdog.cancel()
        if child.stderr is not None:
            child.stderr.close()
        child.returncode = 0  # waited for already
    code = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    if code == -signal.SIGKILL and seconds >= timeout_s:
        said += "\nlate"
    peak = int(noted.read_text()) * 1024 if noted.is_file() else 0
    return Cost(code, said.strip(), seconds, peak)
