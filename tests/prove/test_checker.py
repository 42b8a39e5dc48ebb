"""One checking process for several questions: which state it keeps, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from adaptrix_export.errors import CheckerError, ParityError
from adaptrix_export.progress import Silent
from adaptrix_export.prove import checker as module
from adaptrix_export.prove.checker import Checker
from adaptrix_export.prove.child import run
from adaptrix_export.prove.parity import prove
from tests.prove.bench import Bench

# Answers with its number, the number of questions so far and what it can read of standard input.
ECHO = """
import json, os, pathlib, sys
from adaptrix_export.prove import serve
def work(text, folder, progress):
    asked.append(text)
    if text == "die":
        os.abort()
    with progress.stage("thinking"):
        print("not for the parent")
    counts.append(len(asked))
    return {"pid": os.getpid(), "asked": len(counts), "kept": counts[-1], "stdin": sys.stdin.read()}
asked, counts = [], []
serve.RUNNERS = {"echo": work}
serve.import_libraries = lambda: asked.clear
serve.main()
"""


@pytest.fixture
def echo(monkeypatch, tmp_path):
    (tmp_path / "echo_checker.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "MODULE", "echo_checker")


def test_one_process_answers_all_and_another_follows_a_crash(echo):
    with Checker() as checker:
        checker.start()
        first, second = (checker.ask("echo", text, Silent(), 60) for text in ("one", "two"))
        assert (first["asked"], second["asked"]) == (1, 2)
        assert first["pid"] == second["pid"] and second["stdin"] == ""
        assert (first["kept"], second["kept"]) == (1, 1)  # settings are undone between them
        process = checker._process
        with pytest.raises(CheckerError, match="SIGABRT") as caught:
            checker.ask("echo", "die", Silent(), 60)
        assert caught.value.crashed
        third = checker.ask("echo", "three", Silent(), 60)
        assert third["asked"] == 1 and third["pid"] != first["pid"]
        last = checker._process
    assert process.poll() is not None and last.poll() is not None


def test_a_process_that_was_started_and_not_asked_ends_with_its_checker(echo):
    with Checker() as checker:
        checker.start()
        process = checker._process
        folder = checker._folder
        assert process.poll() is None
    assert process.poll() is not None and not folder.exists()


def test_an_error_ends_no_process_and_leaves_the_next_proof_as_it_is(
    bench: Callable[[str], Bench], tmp_path
) -> None:
    """The same report as of a run in this process, after a proof that failed and threads that were
    set: nothing of one question shows in the next."""
    right = bench("llama").job(level="fast")
    config = tmp_path / "odd" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text("{}")
    wrong = replace(right, adapters=(("odd", config.parent),), threads=1)
    with Checker() as checker:
        with pytest.raises((ParityError, CheckerError)):
            prove(wrong, Silent(), checker=checker)
        assert prove(right, Silent(), checker=checker) == run(right, Silent())


def test_a_graph_that_onnxruntime_refuses_is_a_failed_proof(tmp_path, monkeypatch):
    """Not a crash of the checker: nothing is wrong with the machine."""
    import onnxruntime

    from adaptrix_export.prove import serve

    def refused(job, progress):
        onnxruntime.InferenceSession(b"no graph", providers=["CPUExecutionProvider"])

    monkeypatch.setattr(serve, "run", refused)
    monkeypatch.setattr(serve.Job, "from_json", lambda text: None)
    with pytest.raises(ParityError, match="artifact: ONNX Runtime cannot run it"):
        serve._proof("{}", tmp_path, Silent())
