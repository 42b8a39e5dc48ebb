"""A parity report for people, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrix_export.package.documents import GateCheck, LossEntry, ReportDocument
from adaptrix_export.prove.report import shown_number

if TYPE_CHECKING:
    from rich.table import Table


def table(report: ReportDocument) -> Table:
    """One row a case and one for the replay; green where it passed, red where it did not."""
    from rich.markup import escape
    from rich.table import Table

    title = f"parity ({report.level}, {report.precision}) against {report.oracle}"
    shown = Table(title=title)
    for heading in ("check", "positions", "max abs", "mean KL", "top-1", "result"):
        shown.add_column(heading, justify="left" if heading in ("check", "result") else "right")
    for case in report.cases:
        limit = case.tolerance
        shown.add_row(
            case.name,
            str(case.positions),
            f"{shown_number(case.max_abs)} / {limit.max_abs:g}",
            "n/a" if limit.mean_kl is None else f"{shown_number(case.mean_kl)} / {limit.mean_kl:g}",
            "n/a" if limit.top1 is None else _percent(case.top1),
            _verdict(case.passed),
        )
    replay = report.replay
    shown.add_row(
        "weight replay",
        f"{replay.tensors} tensors",
        f"{shown_number(replay.worst.ulps)} ulp",
        f"{replay.changed} changed",
        f"{replay.failed} failed",
        _verdict(replay.passed),
    )
    for name, adapter in report.adapters.items():
        shown.add_row(
            f"{name}: factors",
            f"{adapter.slots} slots",
            f"{shown_number(adapter.worst)} of a rounding",
            "n/a",
            f"{len(adapter.failures)} failed",
            _verdict(adapter.passed),
        )
    for name, lost in report.approximated.items():
        shown.add_row(
            f"{name}: approximated",
            f"rank {lost.rank}",
            f"{100 * lost.error:.2g}% of the delta lost",
            "n/a",
            f"{100 * lost.worst:.2g}% at worst",
            "for information",
        )
    if report.base_weights is not None:
        bases = report.base_weights
        shown.add_row(
            f"{bases.merged_into} base against {bases.compared_with}",
            str(bases.positions),
            shown_number(bases.max_abs),
            shown_number(bases.mean_kl),
            _percent(bases.top1),
            "for information",
        )
    if report.loss is not None:
        _add_loss(shown, report.loss)
    for check in report.context.checks if report.context else ():
        _add_gates(shown, check)
    if replay.failures:
        shown.caption = "\n".join(
            escape(f"{failure.tensor}: {failure.why}") for failure in replay.failures
        )
        shown.caption_style, shown.caption_justify = "red", "left"
    return shown


def _add_loss(shown: Table, loss: LossEntry) -> None:
    """A row for what rounding cost, against the float model: of features a cosine."""
    if loss.cosine is not None:
        limit = "" if loss.min_cosine is None else f" / {loss.min_cosine:g}"
        shown.add_row(
            "loss: least cosine", f"{loss.rows} rows", f"{loss.least_cosine}{limit}", "", "",
            _verdict(loss.passed),
        )  # fmt: skip
        return
    limit = "" if loss.max_kl is None else f" / {loss.max_kl:g}"
    shown.add_row(
        "loss against the float model", str(loss.positions), "",
        f"{shown_number(loss.mean_kl)}{limit}", _percent(loss.top1),
        _verdict(loss.passed),
    )  # fmt: skip


def _add_gates(shown: Table, check: GateCheck) -> None:
    """A row for one comparison of the gates."""
    where = f"{check.count} nodes" if check.tokens is None else f"{check.tokens}"
    worst = shown_number(check.max_abs) if check.compares_values else ""
    shown.add_row(f"gates: {check.name}", where, worst, "", "", _verdict(check.passed))


def gates_table(report: ReportDocument) -> Table | None:
    """A line a gated site, with the oracle's statistics on the long prompt; None without gates."""
    from rich.table import Table

    sites = report.context.sites if report.context else []
    if not sites:
        return None
    shown = Table(title="context preservation")
    for heading in ("site", "mode", "tau or weight", "gate mean", "gate min", "clamped"):
        shown.add_column(heading, justify="left" if heading in ("site", "mode") else "right")
    for line in sites:
        number = line.weight if line.tau is None else line.tau
        shown.add_row(
            f"{line.adapter}: {line.site}" if line.adapter else line.site,
            line.mode,
            "" if number is None else f"{number:.4g}",
            *("" if n is None else f"{n:.3f}" for n in (line.gate_mean, line.gate_min)),
            "" if line.clamped is None else f"{100 * line.clamped:.1f}%",
        )
    return shown


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.2f}%"


def _verdict(passed: bool) -> str:
    return "[green]passed[/green]" if passed else "[red]failed[/red]"
