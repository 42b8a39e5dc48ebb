"""A parity report in one line, and as the file in the artifact's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrix_export.package.documents import REPORT_FORMAT, ReportDocument


def summary(report: ReportDocument) -> str:
    """One line: the verdict, and either the largest errors or what failed."""
    replay = report.replay
    if report.passed:
        worst = max((case.max_abs or 0.0 for case in report.cases), default=0.0)
        return (
            f"parity passed: {len(report.cases)} cases within {worst:.1e}, "
            f"{replay.tensors} tensors within {shown_number(replay.worst.ulps)} ulp"
        )
    failed = [
        f"{case.name} (max abs {shown_number(case.max_abs)})"
        for case in report.cases
        if not case.passed
    ]
    checks = report.context.checks if report.context else ()
    failed += [f"gates: {check.name}" for check in checks if not check.passed]
    if not replay.passed:
        sites = ", ".join(replay.failures[0].sites)
        failed.append(f"weight replay of {replay.failed} tensors, first at {sites}")
    failed += [
        f"factors of {name}, first at {adapter.failures[0]}"
        for name, adapter in report.adapters.items()
        if not adapter.passed
    ]
    loss = report.loss
    if loss is not None and not loss.passed and loss.cosine is not None:
        failed.append(
            f"a cosine of {loss.least_cosine} with the float model's answers, below "
            f"quantize.min_cosine {loss.min_cosine}"
        )
    elif loss is not None and not loss.passed:
        failed.append(
            f"a loss of {shown_number(loss.mean_kl)} nats a token against the float model, "
            f"above quantize.max_kl {loss.max_kl}"
        )
    return "parity failed: " + "; ".join(failed)


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes the report as JSON, with its version: same report, same bytes."""
    text = json.dumps(
        {"format": REPORT_FORMAT, **report}, indent=2, ensure_ascii=False, allow_nan=False
    )
    path.write_text(text + "\n", encoding="utf-8")


def shown_number(value: float | None) -> str:
    """For a table; None is what was not finite."""
    return "not finite" if value is None else f"{value:.1e}"
