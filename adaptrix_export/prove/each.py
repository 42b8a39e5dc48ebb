"""Proves adapters of a published switchable artifact one after the other, in one process.

Base, oracle and the artifact's session are opened once. An adapter is put on the base by stock
PEFT, compared, and taken off again, so memory stays that of the two models and one adapter. One
that is wrong, or that PEFT cannot load, has a report or an error of its own; the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptrix_export.errors import AdaptrixError
from adaptrix_export.oracle.job import Job
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.prove.checker import ask
from adaptrix_export.prove.parity import TIMEOUT_S

if TYPE_CHECKING:
    from adaptrix_export.graph.rewrite.slots import Slot
    from adaptrix_export.prove.cases import Case
    from adaptrix_export.prove.subject import SwitchableSubject


def prove_each(
    jobs: Mapping[str, Job], progress: Progress, timeout_s: float = TIMEOUT_S
) -> dict[str, dict[str, Any]]:
    """Name of an adapter -> its parity report, or {"error": the error's parts}.

    The jobs are of one artifact and one base, and each has one adapter, by that name. Raises
    CheckerError when the checking process left neither.
    """
    text = json.dumps({name: job.to_json() for name, job in jobs.items()})
    return ask("each", text, progress, timeout_s)


def run_each(text: str, progress: Progress) -> dict[str, Any]:
    """What `prove_each` returns; this runs in the child."""
    from adaptrix_export.prove.cases import select
    from adaptrix_export.prove.subject import SwitchableSubject
    from adaptrix_export.prove.switched import slots_of

    jobs = {name: Job.from_json(job) for name, job in json.loads(text).items()}
    job = next(iter(jobs.values()))
    with progress.stage("artifact: loading"):
        cases = select("onnx", job.level, job.task)
        bench = _Bench(cases, slots_of(job), SwitchableSubject(job))
    reports: dict[str, Any] = {}
    with progress.stage("proving adapters", len(jobs), "adapters") as advance:
        for name, job in jobs.items():
            try:
                reports[name] = bench.report(name, job)
            except AdaptrixError as error:
                reports[name] = {"error": error.as_dict()}
            advance(1)
    return reports


class _Bench:
    """The base in PyTorch, the artifact in ONNX Runtime, and the questions that both are asked."""

    def __init__(
        self, cases: Sequence[Case], slots: Sequence[Slot], subject: SwitchableSubject
    ) -> None:
        self._cases, self._slots, self._subject = cases, slots, subject
        self._base: Any = None  # the plain model, while no adapter is on it

    def report(self, name: str, job: Job) -> dict[str, Any]:
        """The parity report of one adapter. Raises ParityError where PEFT does not load it."""
        from adaptrix_export.oracle.reference import Reference, bare_model, with_adapters
        from adaptrix_export.prove.child import run

        if job.quantized:  # has an oracle of its own
            return run(job, Silent())
        model, self._base = self._base, None  # after an error it is loaded anew
        if model is None:
            model = bare_model(job.base_folder, job.gguf_file, job.task, (), job.simulated)
        adapted = with_adapters(model, job.adapters)
        reference = Reference(adapted.eval())
        report = self._compared(name, job, reference)
        reference.close()
        self._base = _without_adapters(adapted)
        return report

    def _compared(self, name: str, job: Job, reference: Any) -> dict[str, Any]:
        from adaptrix_export.oracle.prompts import choose_prompts
        from adaptrix_export.prove import switched
        from adaptrix_export.prove.cases import ask_all
        from adaptrix_export.prove.child import annotate_report
        from adaptrix_export.prove.gate_cases import ask_gates
        from adaptrix_export.prove.subject import adapter_values

        gates = reference.put_gates(job.gates)
        prompts = choose_prompts(job, reference.vocabulary, reference.positions)
        opened = ask_gates(replace(job, gates=gates), reference, prompts) if gates else None
        answers = switched.Answers(name, ask_all(self._cases, reference, prompts), gates, opened)
        shares = {gate.site: gate.weight for gate in gates if gate.weight is not None}
        values = adapter_values(job, name)
        factors = {name: switched.check_factors(self._slots, values, reference, shares)}
        entries = switched.compared(job, self._cases, self._subject, prompts, [answers], Silent())
        sections = {}
        if job.gates:
            sections["context"] = switched.compared_gates(job, self._subject, prompts, [answers])
        replayed = switched.nothing_replayed()
        report = switched.report_of(job, prompts, replayed, entries, factors, sections)
        return annotate_report(report, job)


def _without_adapters(model: Any) -> Any:
    """The plain model inside a PEFT model, as it was before; None if PEFT left something on it."""
    plain = model.unload()
    if hasattr(plain, "peft_config"):  # else PEFT warns of a second adapter the next time
        del plain.peft_config
    leftover = any(hasattr(module, "get_base_layer") for module in plain.modules())
    return None if leftover else plain
