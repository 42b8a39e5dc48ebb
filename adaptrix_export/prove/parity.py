"""Proves an artifact against its oracle, in the checking process."""

from __future__ import annotations

from typing import Any

from adaptrix_export.oracle.job import Job
from adaptrix_export.progress import Progress
from adaptrix_export.prove.checker import Checker, ask

TIMEOUT_S = 2 * 3600.0  # a 7B model on a few cores takes tens of minutes


def prove(
    job: Job, progress: Progress, timeout_s: float = TIMEOUT_S, checker: Checker | None = None
) -> dict[str, Any]:
    """The parity report of `job`, passed or not (`report["passed"]`).

    Raises `ParityError` when the oracle could not be trusted, `CheckerError` when the checking
    process crashed, was killed or ran past `timeout_s`.
    """
    return ask("proof", job.to_json(), progress, timeout_s, checker)
