"""Proves a quantized artifact, twice.

(a) It is what it says. Its codes and scales, read back, are those that were chosen; and it computes
what PyTorch computes with the values that they stand for: within the bounds of float32 where
activations stay float, and within those of its own format as it is served, activations rounded.

(b) What it loses. Against the float model that it was made from, on text that nothing was fitted
to: KL, top-1 and perplexity, always reported; a loss above the recipe's `quantize.max_kl` fails.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.graph.expression import expression_of
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.dequantized import dequantized
from adaptrix_export.oracle.executed import Executed
from adaptrix_export.oracle.job import Job, tolerance_of
from adaptrix_export.oracle.naming import oracle_name
from adaptrix_export.oracle.prompts import choose_prompts
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.progress import Progress
from adaptrix_export.prove.blocks import replay_blocks, values_of
from adaptrix_export.prove.cases import Case, ask_all, compare, feed, select
from adaptrix_export.prove.loss import FloatAnswers
from adaptrix_export.prove.replay import replay
from adaptrix_export.prove.subject import OnnxSubject
from adaptrix_export.targets import open_stored

DEQUANTIZED = "PyTorch running the dequantized weights; the loss is against "
FLOAT = "float activations: "
FLOAT_CASES = ("prefill", "left-padded batch")  # no single tokens: 8 bits take 20 times as long


def run_quantized(job: Job, progress: Progress) -> dict[str, Any]:
    """The report of a quantized artifact of target onnx; one model in memory at a time."""
    with progress.stage("reference: loading base and adapters"):
        reference = (Executed if job.composition else Reference).open(job)
        batches = reference.pad is not None
        cases = select(job.target, job.level, job.task, pooling=job.pooling, batches=batches)
        prompts = choose_prompts(job, reference.vocabulary, reference.positions, reference.pad)
    with scratch_folder("loss") as folder:
        rows = loss_rows(job, reference, prompts.prefill)
        with progress.stage("reference: the float model's logits", len(rows), "rows"):
            answers = FloatAnswers(rows, lambda row: ask_row(reference, job, row), folder)
        stored = open_stored(job.target, job.artifact)
        with progress.stage("replaying weights", len(job.weights), "tensors") as advance:
            replayed, _ = replay(
                stored, dict(job.weights), reference.live, "base", advance, reference.room
            )
        with progress.stage("replaying codes", len(job.quantized), "tensors") as advance:
            blocks = replay_blocks(stored, job.quantized, reference.live, advance)
        replayed = merged_replay(replayed, blocks, job.quantized)
        others = changed_floats(job, reference)
        reference.close()
        with progress.stage("reference: the dequantized model"):
            oracle = dequantized(job, values_of(stored, job.quantized), others)
            oracle_answers = ask_all(cases, oracle, prompts)
        oracle.close()
        del stored, others
        gc.collect()
        entries = []
        with progress.stage("artifact: float activations"):
            subject = OnnxSubject(job.artifact, job.threads, job.task, accuracy_level=0)
            for case in cases:
                if case.name in FLOAT_CASES:
                    entry = compare(
                        case,
                        subject,
                        prompts,
                        oracle_answers[case.ask],
                        tolerance_of("fp32", job.task),
                    )
                    entries.append({**entry, "name": FLOAT + case.name})
        del subject
        with progress.stage("artifact: as it is served", len(cases), "cases") as advance:
            subject = OnnxSubject(job.artifact, job.threads, job.task)
            entries += _as_served(job, cases, subject, prompts, oracle_answers, advance)
        with progress.stage("artifact: the loss", len(rows), "rows"):
            loss = answers.measure(
                lambda row: ask_row(subject, job, row), job.task, job.max_kl, job.min_cosine
            )
    passed = replayed["passed"] and loss["passed"] and all(e["passed"] for e in entries)
    return {
        "oracle": DEQUANTIZED + oracle_name(job.oracle, composed=bool(job.composition)),
        "target": job.target,
        "level": job.level,
        "precision": job.precision,
        "tolerance": job.precision,
        "task": job.task,
        "tokens": prompts.source,
        "cases": entries,
        "replay": replayed,
        "loss": {"text": job.loss_text, **loss},
        "passed": bool(passed),
    }


def _as_served(
    job: Job, cases: Sequence[Case], subject: Any, prompts: Any, oracle_answers: Any, advance: Any
) -> list[dict[str, Any]]:
    entries = []
    for case in cases:
        limits = tolerance_of(job.precision, job.task)
        entries.append(compare(case, subject, prompts, oracle_answers[case.ask], limits))
        advance(1)
    return entries


@dataclass(frozen=True)
class OnBlocks:
    """What is left of the float model: its answers, and the replay of all weights if it is the
    base."""

    answers: FloatAnswers
    replayed: dict[str, Any]


def on_blocks(
    job: Job,
    reference: Reference,
    own: tuple[tuple[str, Path], ...],
    scratch: Path,
    progress: Progress,
) -> tuple[Reference, OnBlocks]:
    """In place of the float model with adapters `own`, or the base with none: the same adapters
    on the values that are stored for the base, in float."""
    folder = scratch / f"answers-{len(list(scratch.iterdir()))}"
    folder.mkdir()
    rows = loss_rows(job, reference, range(1, 17))
    answers = FloatAnswers(rows, lambda row: ask_row(reference, job, row), folder)
    stored, replayed = open_stored(job.target, job.artifact), dict[str, Any]()
    if not own:
        with progress.stage("replaying weights", len(job.weights), "tensors") as advance:
            floats, _ = replay(stored, dict(job.weights), reference.live, "base", advance)
        with progress.stage("replaying codes", len(job.quantized), "tensors") as advance:
            blocks = replay_blocks(stored, job.quantized, reference.live, advance)
        replayed = merged_replay(floats, blocks, job.quantized)
    reference.close()
    plain = replace(job, adapters=own, gates=())
    oracle = dequantized(plain, values_of(stored, job.quantized), {}, own)
    return oracle, OnBlocks(answers, replayed)


def loss_rows(job: Job, reference: Reference, spare: Sequence[int]) -> list[tuple[int, ...]]:
    """The rows that the build kept apart, or without any the prompt of the proof."""
    room = reference.positions
    rows = [tuple(row)[:room] for row in job.loss_rows] or [tuple(spare)]
    return rows[:2] if job.level == "fast" else rows


def ask_row(model: Any, job: Job, row: Sequence[int]) -> Logits:
    ids = np.array([row], np.int64)
    if job.task != GENERATION:
        logits: Logits = model.encode(ids, np.ones_like(ids), np.zeros_like(ids))[0]
        return logits
    if isinstance(model, Reference):
        return model.prefill(list(row))
    return feed(model, [tuple(row)])


def changed_floats(job: Job, reference: Any) -> dict[str, NDArray[np.float32]]:
    """The parameters that stay float and that adapters change, as the artifact has them."""
    inside = {n for e in job.quantized.values() for n in expression_of(e["expression"]).names()}
    read = {n for e in job.weights.values() for n in e.names()} - inside
    changed_values = {}
    for name in sorted(read):
        value, changed = reference.live(name)
        if changed:
            changed_values[name] = value.astype(np.float32)
    return changed_values


def merged_replay(
    floats: Mapping[str, Any], blocks: Mapping[str, Any], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """One `replay` of the report from those of float tensors and of quantized ones."""
    parts = {f"{name}.scales" for name in entries}
    return {
        **floats,
        "tensors": floats["tensors"] + blocks["tensors"],
        "elements": floats["elements"] + blocks["elements"],
        "failed": floats["failed"] + blocks["failed"],
        "failures": [*floats["failures"], *blocks["failures"]],
        "unmapped": [name for name in floats["unmapped"] if name not in parts],
        "quantized": blocks,
        "passed": bool(floats["passed"] and blocks["passed"]),
    }
