"""The diffs of docs/pages/extend: each makes the test pass that its page names, and fails without.

`stands` are diffs of what the tree already holds; they are taken out first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
NO_TESTS_RAN = 5


@dataclass(frozen=True)
class Example:
    name: str
    test: tuple[str, ...]
    files: int  # of the package
    stands: bool
    without: tuple[int, ...]  # exit codes of pytest without the diff


ROWS = (
    Example("tuner", ("tests/test_tuners.py", "-k", "HRA"), 1, True, (1,)),
    Example("family", ("tests/arch/test_families.py", "-k", "codegen"), 1, True, (NO_TESTS_RAN,)),
    Example("front-end", ("tests/graph/frontends/test_generic.py",), 2, False, (4,)),
    Example("target", ("tests/targets/test_torch.py",), 3, False, (4,)),
)


def changed(diff: str) -> set[str]:
    """The files of the package that a diff touches."""
    lines = (line for line in diff.splitlines() if line.startswith("+++ b/"))
    return {line[6:].split("\t")[0] for line in lines if "+++ b/adaptrix_export/" in line}


def applied(tree: Path, name: str, *options: str) -> bool:
    command = ["git", "apply", "--unsafe-paths", "--unidiff-zero", "-C1", *options]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.diff")], cwd=tree, capture_output=True, text=True
    )
    return done.returncode == 0


def passes(tree: Path, row: Example) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *row.test]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_diff_still_applies_and_touches_so_many_files(row):
    diff = (EXAMPLES / f"{row.name}.diff").read_text(encoding="utf-8")
    assert len(changed(diff)) == row.files
    assert applied(ROOT, row.name, "--check", *(["-R"] if row.stands else []))


def test_every_diff_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.diff")} == {row.name for row in ROWS}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_diff_makes_its_test_pass(tmp_path, row):
    for name in ("adaptrix_export", "tests", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if row.stands:
        assert applied(tmp_path, row.name, "-R")
    assert passes(tmp_path, row) in row.without
    assert applied(tmp_path, row.name)
    assert passes(tmp_path, row) == 0
