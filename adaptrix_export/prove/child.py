"""A proof, in the checking process: the oracle, then the replay, then the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

from adaptrix_export.arch.task_table import VISION_LANGUAGE
from adaptrix_export.arch.tasks import TASKS, TEXT
from adaptrix_export.oracle.job import Job, tolerance_of
from adaptrix_export.oracle.naming import oracle_name
from adaptrix_export.progress import Progress
from adaptrix_export.recipe.targets import Form, facts_of


class Lines:
    """A `Progress` that writes JSON lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _say(self, **line: object) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = ""
    ) -> Iterator[Callable[[int], None]]:
        self._say(event="begin", name=name, total=total, unit=unit)
        yield lambda amount: self._say(event="advance", amount=amount)
        self._say(event="end")

    def note(self, text: str) -> None:
        self._say(event="note", text=text)


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """All cases of `job`; the report that `parity.prove` returns.

    Order keeps one model in memory at a time: the reference answers every question and serves
    the replay, is dropped, and only then is the artifact loaded.
    """
    if not job.facts.composes:
        from adaptrix_export.prove.switched import run_switched

        return annotate_report(run_switched(job, progress), job)
    if job.quantized:
        from adaptrix_export.prove.quantized import run_quantized

        return {**run_quantized(job, progress), "versions": _versions(job.target)}
    from adaptrix_export.oracle.executed import Executed
    from adaptrix_export.oracle.prompts import choose_prompts, drawn_prompts
    from adaptrix_export.oracle.reference import Reference
    from adaptrix_export.oracle.whole import drawn_sources
    from adaptrix_export.prove.bases import compare_bases
    from adaptrix_export.prove.cases import Case, ask_all, compare, drawn_cases, select
    from adaptrix_export.prove.crossings import ask_crossings
    from adaptrix_export.prove.dense import open_dense
    from adaptrix_export.prove.gate_cases import ask_gates, compare_gates
    from adaptrix_export.prove.open_subject import open_subject
    from adaptrix_export.prove.pieces import cases_of
    from adaptrix_export.prove.replay import coarsest, replay
    from adaptrix_export.prove.seeing import SEEING
    from adaptrix_export.targets import open_stored

    cases: tuple[Case, ...]
    with progress.stage("reference: loading base and adapters"):
        reference = (Executed if job.composition else Reference).open(job)
        if job.drawn and job.is_graph:
            if job.task == VISION_LANGUAGE:
                cases, sources = SEEING, reference.vision_sources()
            else:
                pieces = reference.pieces(job.task)
                names = dict.fromkeys(name for piece in pieces for name in piece.inputs)
                cases, sources = cases_of(pieces), drawn_sources(names, reference.config)
            prompts = replace(drawn_prompts(), drawn=sources)
        elif job.drawn:
            cases, prompts = drawn_cases(reference.has_images), drawn_prompts()
        else:
            cases = select(
                job.target, job.level, job.task,
                pooling=job.pooling, batches=reference.pad is not None,
            )  # fmt: skip
            prompts = choose_prompts(job, reference.vocabulary, reference.positions, reference.pad)
            if TASKS[job.task].inputs != TEXT:
                prompts = replace(
                    prompts, drawn=drawn_sources(TASKS[job.task].inputs, reference.config)
                )
    with progress.stage("reference: logits"):
        answers = ask_all(cases, reference, prompts)
        beyond = ask_crossings(job, reference)
    with progress.stage("replaying weights", len(job.weights), "tensors") as advance:
        stored = (
            open_dense(job)
            if job.facts.form is Form.ADAPTER
            else open_stored(job.target, job.artifact)
        )
        exact = partial(reference.live, widen=False)
        replayed, formats = replay(
            stored, dict(job.weights), exact, job.precision, advance, reference.room
        )
    compared: dict[str, Any] = {}
    if job.gates:
        with progress.stage("reference: gates"):
            opened = ask_gates(job, reference, prompts)
    reference.close()
    del stored
    if job.other is not None:
        with progress.stage("reference: the other base weights"):
            ask = cases[0].ask
            compared["base_weights"] = compare_bases(job, ask, prompts, answers[ask].logits)
    precision = coarsest(formats) if job.precision == "base" else job.precision
    with progress.stage("artifact: loading"):
        subject = open_subject(job)
    entries, limits = [], tolerance_of(precision, job.task, job.drawn)
    with progress.stage("comparing logits", len(cases), "cases") as advance:
        for case in cases:
            entries.append(compare(case, subject, prompts, answers[case.ask], limits))
            advance(1)
    for crossing in beyond:
        entries += crossing.compare(subject, limits)
    if job.gates:
        compared["context"] = compare_gates(job, subject, prompts, opened)
    return {
        "oracle": oracle_name(job.oracle, composed=bool(job.composition), gated=bool(job.gates)),
        "target": job.target,
        "level": job.level,
        "precision": job.precision,
        "tolerance": precision,
        "task": job.task,
        "tokens": prompts.source,
        "cases": entries,
        "replay": replayed,
        **compared,
        "passed": bool(
            replayed["passed"]
            and all(entry["passed"] for entry in entries)
            and compared.get("context", {}).get("passed", True)
        ),
        "versions": _versions(job.target),
    }


def annotate_report(report: dict[str, Any], job: Job) -> dict[str, Any]:
    """The report of a switchable artifact with the job's target, level and task, and versions."""
    job_fields = {"target": job.target, "level": job.level, "task": job.task}
    return {**report, **job_fields, "versions": _versions(job.target)}


def _versions(target: str) -> dict[str, str]:
    names = ["numpy", "peft", "torch", "transformers"]
    names += (
        ["onnx-ir", "onnxruntime", "onnxruntime-gpu"]
        if facts_of(target).form is Form.GRAPH
        else ["safetensors"]
    )
    versions: dict[str, str] = {}
    for name in sorted(names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # only one of the two ONNX Runtime packages is ever installed
    return versions
