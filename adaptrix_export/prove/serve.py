"""The checking process: `python -m adaptrix_export.prove.serve`, asked by `checker.Checker`.

Each line of standard input names a kind of work and a folder with `job.json`; `report.json` is put
beside it, with a report or an error. The process tells its parent how far it is in JSON lines on
standard output. It may crash without harm: the parent says so in words.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from adaptrix_export.errors import ParityError, known
from adaptrix_export.oracle.job import Job
from adaptrix_export.progress import Progress
from adaptrix_export.prove.child import Lines, run
from adaptrix_export.prove.each import run_each
from adaptrix_export.prove.lifetime import end_with_parent
from adaptrix_export.prove.preflight.child import answer


def _proof(text: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Raises ParityError for a graph that ONNX Runtime refuses to load or to run."""
    try:
        return run(Job.from_json(text), progress)
    except Exception as error:
        theirs = type(error).__module__.startswith("onnxruntime")
        if not theirs or known(error) is not None:
            raise
        said = " ".join(str(error).split())[:300]
        raise ParityError(
            "artifact", f"ONNX Runtime cannot run it ({said})", "a graph that runs",
            "try --frontend traced, or --target safetensors",
        ) from error  # fmt: skip


def _each(text: str, folder: Path, progress: Progress) -> dict[str, Any]:
    return run_each(text, progress)


def _preflight(text: str, folder: Path, progress: Progress) -> dict[str, Any]:
    return answer(json.loads(text), folder)


# (the job, its own folder, a progress) -> the report
Runner = Callable[[str, Path, Progress], dict[str, Any]]
RUNNERS: Mapping[str, Runner] = {"proof": _proof, "each": _each, "preflight": _preflight}


def serve(questions: TextIO, lines: TextIO) -> None:
    """Answers one question after the other, until there are no more."""
    reset = import_libraries()
    for question in questions:
        request = json.loads(question)
        reset()
        _answer(RUNNERS[request["kind"]], Path(request["folder"]), Lines(lines))
        gc.collect()  # models are full of circles
        lines.write(json.dumps({"event": "done"}) + "\n")
        lines.flush()


def import_libraries() -> Callable[[], None]:
    """Import what the oracle needs, seconds of it, while the parent is busy; returns what
    undoes the settings of a question, for the next."""
    import torch

    import adaptrix_export.oracle.reference  # noqa: F401

    threads = torch.get_num_threads()  # a replica has one
    return lambda: torch.set_num_threads(threads)


def _answer(runner: Runner, folder: Path, progress: Progress) -> None:
    """Run one job; write its report, or the parts of its error, into its folder."""
    text = (folder / "job.json").read_text(encoding="utf-8")
    try:
        document = {"report": runner(text, folder, progress)}
    except Exception as error:
        failure = known(error)  # no memory, a full disk: said as such
        if failure is None:
            raise  # a fault of ours: its last lines are in the parent's error
        document = {"error": failure.as_dict()}
    report = json.dumps(document, allow_nan=False)
    (folder / "report.json").write_text(report, encoding="utf-8")


def main() -> int:
    """Libraries print to standard output as they like, and may ask: the streams are ours alone."""
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(questions, lines)
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
