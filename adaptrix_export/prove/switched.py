"""Proves a switchable artifact: the base alone, then each adapter alone, against its own oracle.

The oracle of an adapter is the live PEFT model with that adapter and no other; that of the base is
the plain model. With an adapter a row, a batch whose rows have different adapters is compared with
each row's own oracle, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adaptrix_export.graph.rewrite.slots import Slot
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.oracle.compare import Logits, rounded
from adaptrix_export.oracle.job import GateSpec, Job, Tolerance, tolerance_of
from adaptrix_export.oracle.naming import oracle_name
from adaptrix_export.oracle.prompts import Prompts, choose_prompts
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.progress import Progress
from adaptrix_export.prove.cases import (
    CASES,
    Answer,
    Ask,
    Case,
    ask_all,
    ask_rows,
    compare,
    select,
)
from adaptrix_export.prove.gate_cases import OracleGates, ask_gates, compare_gates, function_nodes
from adaptrix_export.prove.quantized import DEQUANTIZED, FLOAT, OnBlocks, ask_row, on_blocks
from adaptrix_export.prove.replay import replay
from adaptrix_export.prove.subject import OnnxSubject, SwitchableSubject, adapter_values
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.stamps import FACTS
from adaptrix_export.targets import open_stored

BASE = "base alone"
TWIN = "base alone, without slots"
# A slot holds A as it is and scale * B rounded once to fp32; sums of fp64 products differ by less.
ROUNDING = 2.0**-23
NOISE = 2.0**-46


@dataclass(frozen=True)
class Answers:
    """What one oracle said; `name` is the adapter, None the base."""

    name: str | None
    of: dict[Ask, Answer]
    gates: tuple[GateSpec, ...] = ()  # of the modules that this adapter acts on
    opened: OracleGates | None = None  # how far they are open


def run_switched(job: Job, progress: Progress) -> dict[str, Any]:
    """The report of a switchable artifact; see `_report`."""
    with scratch_folder("loss") as folder:
        return _report(job, progress, folder)


def _report(job: Job, progress: Progress, scratch: Path) -> dict[str, Any]:
    """`adapters` in the report has the factors of each adapter.

    One oracle is in memory at a time, and none when the artifact is loaded. Without `weights` in
    the job the base is left out: it was proved before, and only an adapter is new.
    """
    cases = select("onnx", job.level, job.task)
    names = list(dict.fromkeys(name for name, _ in job.adapters))
    facts, slots = facts_of(job), slots_of(job)
    answered: list[Answers] = []
    blocks: dict[str | None, OnBlocks] = {}
    replayed, factors = nothing_replayed(), dict[str, Any]()
    prompts: Prompts | None = None
    for name in ([None] if job.weights else []) + names:
        own = tuple(pair for pair in job.adapters if pair[0] == name)
        with progress.stage(f"reference: {name or BASE}"):
            reference = Reference.open(replace(job, adapters=own, gates=()))
        if job.quantized:
            reference, blocks[name] = on_blocks(job, reference, own, scratch, progress)
        with progress.stage(f"reference: {name or BASE}, logits"):
            gates = reference.put_gates(job.gates)
            prompts = prompts or choose_prompts(job, reference.vocabulary, reference.positions)
            opened = ask_gates(replace(job, gates=gates), reference, prompts) if gates else None
            answered.append(Answers(name, ask_all(cases, reference, prompts), gates, opened))
        if name is None and job.quantized:
            replayed = blocks[name].replayed
        elif name is None:
            with progress.stage("replaying weights", len(job.weights), "tensors") as advance:
                stored = open_stored(job.target, job.artifact)
                exact = partial(reference.live, widen=False)
                replayed, _ = replay(stored, dict(job.weights), exact, job.precision, advance)
        else:
            values = row_values(job, facts, name) if "rows" in facts else adapter_values(job, name)
            shares = {gate.site: gate.weight for gate in gates if gate.weight is not None}
            factors[name] = check_factors(slots, values, reference, shares)
        reference.close()
    assert prompts is not None
    entries = list[dict[str, Any]]()
    if answered[0].name is None and "rows" not in facts:
        entries += _compared_twin(job, cases, prompts, answered[0], progress)
    with progress.stage("artifact: loading"):
        subject = SwitchableSubject(job)
    entries += compared(job, cases, subject, prompts, answered, progress)
    sections: dict[str, Any] = {}
    if job.quantized:
        entries += _float_activations(job, cases, prompts, answered, progress)
        sections["loss"] = _losses(job, subject, blocks)
    if job.gates:
        sections["context"] = compared_gates(job, subject, prompts, answered)
    return report_of(job, prompts, replayed, entries, factors, sections)


def report_of(
    job: Job,
    prompts: Prompts,
    replayed: Mapping[str, Any],
    entries: list[dict[str, Any]],
    factors: Mapping[str, Any],
    sections: Mapping[str, Any],
) -> dict[str, Any]:
    """The report; passed if every part passed. `sections` are parts that only some jobs have."""
    parts = (replayed, *entries, *factors.values(), *sections.values())
    return {
        "oracle": DEQUANTIZED * bool(job.quantized)
        + oracle_name(job.oracle, gated=bool(job.gates), apart=True),
        "precision": job.precision,
        "tolerance": job.precision,
        "tokens": prompts.source,
        "cases": entries,
        "replay": replayed,
        "adapters": factors,
        **sections,
        "passed": all(bool(part.get("passed", True)) for part in parts),
    }


def slots_of(job: Job) -> list[Slot]:
    """The slots of a graph, of rows or not."""
    facts = facts_of(job)
    return [Slot.from_dict(entry) for entry in facts.get("slots") or facts.get("row_slots") or ()]


def _float_activations(
    job: Job,
    cases: Sequence[Case],
    prompts: Prompts,
    answered: Sequence[Answers],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A line for each adapter: one prompt, activations left as they are, at the bounds of fp32."""
    limits = tolerance_of("fp32", job.task)
    entries = []
    with progress.stage("artifact: float activations", len(answered)) as advance:
        subject = SwitchableSubject(job, accuracy_level=0)
        for answers in answered:
            subject.choose(answers.name)
            entry = compare(cases[0], subject, prompts, answers.of[cases[0].ask], limits)
            entries.append({**entry, "name": f"{FLOAT}{answers.name or BASE}: {cases[0].name}"})
            advance(1)
    return entries


def _losses(
    job: Job, subject: SwitchableSubject, blocks: Mapping[str | None, OnBlocks]
) -> dict[str, Any]:
    """The loss of the base and of each adapter; of the whole the largest."""
    losses: dict[str, Any] = {}
    for name, own in blocks.items():
        subject.choose(name)
        measured = own.answers.measure(lambda row: ask_row(subject, job, row), job.task, job.max_kl)
        losses[name or BASE] = measured
    worst = max(losses.values(), key=lambda loss: loss["mean_kl"])
    passed = all(loss["passed"] for loss in losses.values())
    return {"text": job.loss_text, **worst, "each": losses, "passed": passed}


def facts_of(job: Job) -> dict[str, Any]:
    """What the graph's metadata says of its slots."""
    import onnx_ir as ir

    text = ir.load(located(job.artifact, "model.onnx")).metadata_props.get(FACTS, "{}")
    return dict(json.loads(text))


def row_values(job: Job, facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The factors of one adapter out of those that a graph with rows has side by side."""
    stored = open_stored(job.target, job.artifact)
    number = facts["rows"].index(name)
    values: dict[str, Any] = {}
    for slot in facts["row_slots"]:
        own = np.array(slot["owners"]) == number
        if own.any():
            values[slot["a"]] = stored.read(slot["a"])[:, own]
            values[slot["b"]] = stored.read(slot["b"])[own]
    return values


def nothing_replayed() -> dict[str, Any]:
    worst = {"tensor": "", "ulps": 0.0}
    return {
        "tensors": 0, "elements": 0, "changed": 0, "worst": worst, "failed": 0, "failures": [],
        "unmapped": [], "passed": True,
    }  # fmt: skip


def _compared_twin(
    job: Job,
    cases: Sequence[Case],
    prompts: Prompts,
    base: Answers,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A line for each case on the graph without slots."""
    limits = tolerance_of(job.precision, job.task)
    with progress.stage("the graph without slots", len(cases), "cases") as advance:
        subject = OnnxSubject(job.artifact, job.threads, file=SLOTLESS)
        entries = []
        for case in cases:
            entry = compare(case, subject, prompts, base.of[case.ask], limits)
            entries.append({**entry, "name": f"{TWIN}: {case.name}"})
            advance(1)
    return entries


def compared(
    job: Job,
    cases: Sequence[Case],
    subject: SwitchableSubject,
    prompts: Prompts,
    answered: Sequence[Answers],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A line for each adapter and case, and for batches of different adapters."""
    limits = tolerance_of(job.precision, job.task)
    entries = []
    with progress.stage("comparing logits", len(cases) * len(answered), "cases") as advance:
        for answers in answered:
            subject.choose(answers.name)
            for case in cases:
                entry = compare(case, subject, prompts, answers.of[case.ask], limits)
                entries.append({**entry, "name": f"{answers.name or BASE}: {case.name}"})
                advance(1)
    if subject.by_row and job.level == "full":
        entries += _mixed(subject, prompts, answered, limits)
    return entries


def _mixed(
    subject: SwitchableSubject, prompts: Prompts, answered: Sequence[Answers], limits: Tolerance
) -> list[dict[str, Any]]:
    """The ragged batches again, each row with another adapter, as many times as it takes until
    every adapter has been in a batch with others."""
    entries = []
    lengths = [len(row) for row in prompts.rows]
    cuts = np.cumsum(lengths)[:-1]
    for first in range(0, len(answered), len(lengths)):
        chosen = [answered[(first + row) % len(answered)] for row in range(len(lengths))]
        parts: list[Logits] = [
            np.split(answers.of[ask_rows].logits, cuts)[row] for row, answers in enumerate(chosen)
        ]
        subject.choose_rows([answers.name for answers in chosen])
        label = ", ".join(answers.name or "base" for answers in chosen)
        for case in CASES:
            if case.ask is ask_rows:
                entry = compare(case, subject, prompts, Answer(np.concatenate(parts)), limits)
                entries.append({**entry, "name": f"rows of {label}: {case.name}"})
    return entries


def compared_gates(
    job: Job, subject: SwitchableSubject, prompts: Prompts, answered: Sequence[Answers]
) -> dict[str, Any]:
    """The report's `context`: the graph's function nodes, and each adapter's own gates.

    What the graph tells of modules that an adapter leaves alone is not compared: nothing is gated
    there.
    """
    sites: list[dict[str, Any]] = []
    depending = [gate.site for gate in job.gates if gate.depends_on_data]
    checks = [function_nodes(job)] if depending else []
    for answers in answered:
        if answers.opened is None:
            continue
        subject.choose(answers.name)
        places = [depending.index(g.site) for g in answers.gates if g.depends_on_data]
        own = replace(job, gates=answers.gates)
        entry = compare_gates(own, subject, prompts, answers.opened, places)
        sites += [{"adapter": answers.name, **line} for line in entry["sites"]]
        checks += [{**c, "name": f"{answers.name}: {c['name']}"} for c in entry["checks"]]
    return {"sites": sites, "checks": checks, "passed": all(c["passed"] for c in checks)}


def check_factors(
    slots: Sequence[Slot],
    values: dict[str, Any],
    reference: Reference,
    shares: Mapping[str, float],
) -> dict[str, Any]:
    """Every slot of an adapter file, multiplied out in fp64, against the live layers' deltas, or
    the share of one that `shares` names by its site.

    What a slot adds outside of the columns of adapted modules must be nothing at all; a module
    that the oracle adapts and no slot holds is a failure, too.
    """
    worst, failures, covered = 0.0, list[str](), set[str]()
    for slot in slots:
        filled = slot.a in values
        a = values[slot.a].astype(np.float64) if filled else np.zeros((slot.inputs, 0))
        b = values[slot.b].astype(np.float64) if filled else np.zeros((0, slot.outputs))
        outside = np.ones(slot.outputs, bool)
        for member in slot.members:
            expected, size = reference.delta(member.site)
            covered.add(member.site)
            if expected is None:
                continue
            expected = shares.get(member.site, 1.0) * expected
            columns = slice(*member.columns)
            outside[columns] = False
            product = (a @ b[:, columns]).T
            room = ROUNDING * (np.abs(a) @ np.abs(b[:, columns])).T + NOISE * size
            off = np.abs(product - expected[slice(*member.rows)]) / room
            worst = max(worst, float(np.nan_to_num(off, nan=np.inf).max(initial=0.0)))
            if not (off <= 1).all():
                failures.append(member.site)
        if b[:, outside].any():
            failures.append(f"{slot.name}: columns of modules that the adapter leaves alone")
    failures += [f"{site}: no slot" for site in sorted(reference.adapted() - covered)]
    return {
        "slots": sum(slot.a in values for slot in slots),
        "worst": rounded(worst),
        "failures": failures[:10],
        "passed": not failures,
    }
