"""Environments of their own, for what must not share ours; kept under build/ between runs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parents[1] / "build" / "clients"


def environment(name: str, *packages: str, stamp: str = "") -> Path:
    """The Python of an environment with `packages`, installed one by one, in order.

    It is made anew when the packages, the Python version or `stamp` change.
    """
    folder = FOLDER / f"{name}-{sys.version_info[0]}.{sys.version_info[1]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = " ".join((*packages, stamp))
    with FileLock(f"{folder}.lock"):
        if not ready.exists() or ready.read_text() != wanted:
            venv.create(folder, with_pip=True, clear=True)
            for package in packages:
                command = [python, "-m", "pip", "install", "--quiet", "--no-compile", package]
                subprocess.run(command, check=True, timeout=900)
            ready.write_text(wanted)
    return python


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run that Python offline, without this process's own search path."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [python, *map(str, arguments)],
        timeout=600, cwd=cwd, env={**own, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
