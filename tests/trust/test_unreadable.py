"""Files and folders that may not be read, written or looked at: named, exit code 2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trust import measured
from tests.trust.fixtures import Inputs, make_inputs

# A superuser may read everything: the two capabilities for that are given up for good first.
UNPRIVILEGED = f"""
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-c", {measured.MAIN!r}, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def build(folder: Path) -> list[str]:
    return ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
            "--target", "safetensors", "--parity", "off", "--out", str(folder / "out")]  # fmt: skip


def verify(folder: Path) -> list[str]:
    return ["verify", str(folder / "base")]


def run(folder: Path) -> list[str]:
    return ["run", str(folder / "base"), "--prompt", "x"]


CASES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "config of a base": ("base/config.json", build),
    "weights of a base": ("base/model.safetensors", build),
    "a tokenizer": ("base/tokenizer.json", build),
    "config of an adapter": ("adapter/adapter_config.json", build),
    "weights of an adapter": ("adapter/adapter_model.safetensors", build),
    "a base": ("base", build),
    "an adapter": ("adapter", build),
    "an artifact": ("base", verify),
    "an artifact to run": ("base", run),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_may_not_be_read_is_named(name: str, inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.base, tmp_path / "base")
    shutil.copytree(inputs.adapter, tmp_path / "adapter")
    place, command = CASES[name]
    path = tmp_path / place
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        done = measured.run(command(tmp_path), tmp_path, program=UNPRIVILEGED)
    finally:
        path.chmod(mode)
    assert done.code == 2, done.said
    last = done.said.splitlines()[-1]
    assert last.lower().startswith("error: ")  # or of click, which looks first
    assert path.name in last, done.said
    assert "internal" not in last and not (tmp_path / "out").exists()


def test_an_output_that_may_not_be_written_is_named(inputs: Inputs, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    command = ["build", "--base", str(inputs.base), "--adapter", str(inputs.adapter),
               "--target", "safetensors", "--parity", "off",
               "--out", str(closed / "out")]  # fmt: skip
    done = measured.run(command, tmp_path, program=UNPRIVILEGED)
    assert done.code == 2 and "not writable" in done.said, done.said
    assert os.listdir(closed) == []
