"""The cases around each threshold of a model, asked of the reference, then of the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptrix_export.oracle.job import Job, Tolerance
from adaptrix_export.oracle.prompts import Prompts, crossing
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.oracle.thresholds import Threshold
from adaptrix_export.prove.cases import (
    Answer,
    Ask,
    Case,
    ask_all,
    compare,
    select_crossing,
)
from adaptrix_export.prove.subject import Subject


@dataclass(frozen=True)
class Crossing:
    """What the reference answered around one threshold."""

    threshold: Threshold
    cases: tuple[Case, ...]
    prompts: Prompts
    answers: Mapping[Ask, Answer]

    def compare(self, subject: Subject, tolerance: Tolerance) -> list[dict[str, Any]]:
        """An entry of the report for each case, named after the threshold."""
        entries = []
        for case in self.cases:
            entry = compare(case, subject, self.prompts, self.answers[case.ask], tolerance)
            entries.append({**entry, "name": f"{case.name} across a {self.threshold}"})
        return entries


def ask_crossings(job: Job, reference: Reference) -> list[Crossing]:
    """The reference's answers for each threshold of the job that has positions beyond it."""
    crossings = []
    for threshold in job.crossings if job.level == "full" else ():
        cases = select_crossing(job.target, job.task, threshold.switching)
        prompts = crossing(job, threshold, reference.vocabulary, reference.positions)
        if cases and prompts is not None:
            crossings.append(
                Crossing(threshold, cases, prompts, ask_all(cases, reference, prompts))
            )
    return crossings
