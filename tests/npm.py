"""Packages from npm and a browser, for tests of what runs there; kept under build/ between runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

FOLDER = Path(__file__).parents[1] / "build" / "clients" / "npm"
PINS = {
    "axe-core": "4",
    "@huggingface/transformers": "4",
    "onnxruntime-node": "1",
    "onnxruntime-web": "1",
    "playwright-core": "1",
}


def modules(*wanted: str) -> Path:
    """The folder that has `node_modules` with these packages; the test is skipped without them.

    ADAPTRIX_NPM names another such folder. With ADAPTRIX_CLIENTS=1 they are installed, and what is
    missing then fails. Install scripts do not run: they would fetch binaries for other devices.
    """
    folder = Path(os.environ.get("ADAPTRIX_NPM") or FOLDER)
    missing = [name for name in wanted if not (folder / "node_modules" / name).is_dir()]
    if missing and os.environ.get("ADAPTRIX_CLIENTS") == "1":
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            (folder / "package.json").write_text(
                json.dumps({"private": True, "dependencies": PINS})
            )
            subprocess.run(
                ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"],
                cwd=folder, check=True, timeout=900,
            )  # fmt: skip
        missing = []
    if missing or shutil.which("node") is None:
        pytest.skip(f"needs node and {', '.join(missing)}: run `make clients`")
    return folder


def chromium() -> str:
    """The browser, or the test is skipped; with ADAPTRIX_CLIENTS=1 it must be there."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("ADAPTRIX_CLIENTS") == "1":
            raise AssertionError("no chromium: apt-get install chromium")
        pytest.skip("needs chromium")
    return found
