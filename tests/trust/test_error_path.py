"""Every error class, with a report and without, ends as one line or one document, and its code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adaptrix_export import errors
from adaptrix_export.cli import main
from adaptrix_export.errors import AdaptrixError, ParityError

ROOT = Path(__file__).parents[2]
BUILD = ["build", "--base", "b", "--adapter", "a", "--target", "onnx", "--out", "o"]
LIMITS = {"max_abs": 1e-3, "mean_kl": 1e-4, "top1": 0.99}
CASE: dict[str, Any] = {"name": "prefill", "positions": 9, "max_abs": 0.5, "mean_kl": 1e-9}
PARITY: dict[str, Any] = {
    "oracle": "PyTorch + PEFT", "level": "full", "precision": "fp32", "passed": False,
    "target": "onnx", "task": "text-generation", "tolerance": "fp32", "tokens": "a prompt",
    "versions": {},
    "cases": [CASE | {"top1": 1.0, "passed": False, "tolerance": LIMITS, "finite": True}],
    "replay": {"elements": 1, "tensors": 1, "changed": 1, "failed": 0, "failures": [],
               "unmapped": [], "worst": {"ulps": 0.5, "tensor": "x"}, "passed": True},
}  # fmt: skip
REPORTS: dict[str, Any] = {
    "none": None,
    "empty": {},
    "parity": PARITY,
    "fidelity": {"fidelity": {}},
}


def _classes(root: type[AdaptrixError]) -> Iterator[type[AdaptrixError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _classes(kind)


CLASSES = sorted(set(_classes(AdaptrixError)), key=lambda kind: kind.__name__)


def _invoke(monkeypatch: pytest.MonkeyPatch, error: BaseException, *more: str) -> Result:
    def build(*_: object) -> None:
        raise error

    monkeypatch.setattr("adaptrix_export.pipeline.build", build)
    return CliRunner().invoke(main, [*BUILD, *more])


def test_the_classes_are_those_of_the_module() -> None:
    public = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert {kind for kind in public if issubclass(kind, AdaptrixError)} == set(CLASSES)
    assert len(CLASSES) >= 13


@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
@pytest.mark.parametrize("report", sorted(REPORTS))
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_is_one_line_or_one_document(
    monkeypatch: pytest.MonkeyPatch, kind: type[AdaptrixError], report: str, as_json: bool
) -> None:
    error = kind("place", "found", "expected", "remedy")
    error.report = REPORTS[report]
    done = _invoke(monkeypatch, error, *(["--json"] if as_json else []))
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == kind.exit_code != 0
    assert "Traceback" not in done.output
    if as_json:
        document = json.loads(done.stdout)
        assert (document["error"], document["exit_code"]) == (kind.__name__, kind.exit_code)
        assert document.get("report") == REPORTS[report]
        assert done.stderr == ""
        return
    assert done.stderr == "error: place: found, expected expected; remedy\n"
    assert ("prefill" in done.stdout) == (report == "parity")


class PanicException(BaseException):  # as PyO3 names what a panic in Rust becomes
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PanicException("index out of bounds"), "internal error: PanicException"),
        (RecursionError("too deep"), "internal error: RecursionError"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (OSError(errno.EFBIG, "x", "o"), "o: a file became larger than this system allows"),
        (OSError(errno.EMFILE, "x"), "too many open files"),
    ],
)
def test_what_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    done = _invoke(monkeypatch, error)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ") and said in done.stderr


RAISING = """
import sys
from adaptrix_export import cli, errors, pipeline
from tests.trust.test_error_path import BUILD, PARITY
def build(*_):
    error = errors.ParityError("o", "off by 1")
    error.report = PARITY
    raise error
pipeline.build = build
cli.main(BUILD + sys.argv[1:])
"""


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_under_stdout_does_not_hide_the_failure(more: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", RAISING, *more], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip
    assert done.stderr == "error: o: off by 1\n"
    assert done.returncode == 1


def test_a_name_that_is_no_text_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = _invoke(monkeypatch, ParityError("o\udcff", "bad"))
    assert done.stderr == "error: o\\udcff: bad\n"
