"""What lies outside the versions that were tested is said once, in one line."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from adaptrix_export import cli
from adaptrix_export.compat.ranges import outside_ranges

ROOT = Path(__file__).parents[2]


def test_a_version_outside_its_range_is_named_with_the_range():
    numpy, clicked = version("numpy"), version("click")
    line = outside_ranges(
        [f"numpy<{numpy}", f"click>={clicked}", "no-such-library>=1", "adaptrix-export[cpu]",
         'rich>999; extra == "build"']
    )  # fmt: skip
    assert line is not None and "\n" not in line
    assert f"numpy {numpy}, tested <{numpy}" in line and f"rich {version('rich')}" in line
    assert "click" not in line and "no-such-library" not in line and "adaptrix" not in line


def test_what_lies_inside_is_not_spoken_of():
    numpy = version("numpy")
    assert outside_ranges([f"numpy=={numpy}"]) is None
    assert outside_ranges([f"numpy<{numpy}", f"numpy>={numpy}"]) is None  # of two extras
    line = outside_ranges([f"numpy<{numpy}", f"numpy>{numpy}"])
    assert line is not None and line.endswith(f"numpy {numpy}, tested <{numpy} or >{numpy}")
    assert outside_ranges([]) is None


@pytest.mark.parametrize("line", ["outside the versions: numpy 9", None])
def test_a_command_says_it_once_on_standard_error_and_goes_on(monkeypatch, line):
    calls = []
    monkeypatch.setattr(cli, "outside_ranges", lambda: calls.append(1) or line)
    monkeypatch.setitem(cli.main.commands, "probe", click.Command("probe", callback=lambda: None))
    found = CliRunner().invoke(cli.main, ["probe"])
    assert found.exit_code == 0 and found.stdout == "" and calls == [1]
    assert found.stderr.splitlines() == ([f"note: {line}; going on"] if line else [])


def test_every_library_that_decides_a_graph_has_an_upper_bound():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("transformers", "peft", "onnx", "onnx-ir", "onnxscript", "mobius-onnx", "torch"):
        assert re.search(rf'"{name}>=[\d.]+,<[\d.]+"', text), name
    bounds = set(re.findall(r'"onnxruntime(?:-gpu)?>=[\d.]+,<[\d.]+"', text))
    # to run, to build on the CPU, to build for a GPU
    assert sorted(bounds) == [
        '"onnxruntime-gpu>=1.24,<1.33"', '"onnxruntime>=1.20,<1.33"', '"onnxruntime>=1.24,<1.33"'
    ]  # fmt: skip
