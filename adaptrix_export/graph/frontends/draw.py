"""Front ends: each turns a plan into an ONNX graph whose weights are expressions, not values.

A front end is a row of `FRONTENDS`. None of them is trusted: the caller passes a trial, which
compares the front end's graph of a small random model of the same type with PyTorch first, and the
parity check of the build has the last word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from adaptrix_export.arch.task_table import VISION_LANGUAGE
from adaptrix_export.arch.tasks import SEQ2SEQ
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends.faults import REMEDIES
from adaptrix_export.graph.graph import Graph
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress

FrontEnd = Callable[[Plan, str, Progress], Graph]


def _native(plan: Plan, provider: str, progress: Progress) -> Graph:
    from adaptrix_export.graph.frontends.native import native

    with progress.stage("graph"):
        return native(plan, provider)


def _traced(plan: Plan, provider: str, progress: Progress) -> Graph:
    from adaptrix_export.graph.frontends.traced import traced

    return traced(plan, provider, progress)


FRONTENDS: dict[str, FrontEnd] = {"native": _native, "traced": _traced}
AUTO = "auto"


@dataclass(frozen=True)
class Verdict:
    """Whether a front end may be used; if not, `why` is the failed case or the refusal."""

    passed: bool
    why: str = ""


class Trial(Protocol):
    """Tries a front end on a small random replica of the plan's model."""

    def __call__(self, plan: Plan, provider: str, frontend: str, progress: Progress) -> Verdict: ...


def draw(
    plan: Plan, provider: str, frontend: str, progress: Progress, trial: Trial | None = None
) -> Graph:
    """The graph of `plan` for an execution provider, by the front end of that name or by `auto`.

    Each is tried by `trial` first, if there is one; where `native` fails, `auto` traces instead.
    Raises UnsupportedError where the front end cannot draw it, or draws it wrongly.
    """
    if frontend not in (AUTO, "native"):
        _try(plan, provider, frontend, progress, trial)
        return _drawn(frontend, plan, provider, progress)
    from adaptrix_export.graph.frontends.native import check_known

    try:
        check_known(plan)
        _try(plan, provider, "native", progress, trial)
        return _drawn("native", plan, provider, progress)
    except UnsupportedError as error:
        if frontend != AUTO:
            raise
        reason = f"native: {error.found}"
    progress.note(f"front end traced, not {reason}")
    _try(plan, provider, "traced", progress, trial)
    return replace(_drawn("traced", plan, provider, progress), reason=reason)


def _drawn(frontend: str, plan: Plan, provider: str, progress: Progress) -> Graph:
    """The graph of a front end, after `check_structure`."""
    graph = FRONTENDS[frontend](plan, provider, progress)
    from adaptrix_export.graph.structure import check_structure

    check_structure(graph.model, graph.weights, plan, frontend)
    return graph


def _try(plan: Plan, provider: str, frontend: str, progress: Progress, trial: Trial | None) -> None:
    """Raise UnsupportedError where a front end draws a small replica of the model wrongly."""
    if trial is None or frontend not in REMEDIES:
        return  # the trial's process does not know front ends that were added at run time
    with progress.stage(f"trying the {frontend} front end on a small replica"):
        verdict = trial(plan, provider, frontend, progress)
    if not verdict.passed:
        kind = plan.base.architecture.model_type
        raise UnsupportedError(
            f"{plan.base.spec}: front end {frontend}, model type {kind!r}", verdict.why,
            "what PyTorch computes", REMEDIES[frontend],
        )  # fmt: skip


def draw_parts(
    plan: Plan, provider: str, frontend: str, progress: Progress, trial: Trial | None = None
) -> dict[str, Graph]:
    """The graphs of a model that is exported as several files, by file name: encoder-decoders, and
    models whose module names come from their class. Only the traced front end supports them.

    Raises UnsupportedError where another is asked for, and what that one raises.
    """
    if frontend not in (AUTO, "traced"):
        raise UnsupportedError(
            f"{plan.base.spec}: task {plan.base.task}", f"front end {frontend}", "traced",
            "leave the front end to auto",
        )  # fmt: skip
    if plan.base.skeleton is not None:
        from adaptrix_export.graph.frontends.traced_seeing import traced_seeing
        from adaptrix_export.graph.frontends.traced_whole import traced_whole

        sees = plan.base.task == VISION_LANGUAGE
        trace, kind = traced_seeing if sees else traced_whole, "a type without a row of names"
    else:
        from adaptrix_export.graph.frontends.traced_parts import traced_parts

        trace, kind = traced_parts, "an encoder-decoder"
        # There are no replicas of models with other inputs than tokens: only parity checks them.
        if plan.base.task == SEQ2SEQ:
            _try(plan, provider, "traced", progress, trial)
    parts = trace(plan, provider, progress)
    for graph in parts.values():
        from adaptrix_export.graph.structure import check_structure

        check_structure(graph.model, graph.weights, plan, graph.frontend)
    if frontend == AUTO:
        reason = f"{kind}, which the native front end does not draw"
        parts = {file: replace(graph, reason=reason) for file, graph in parts.items()}
    return parts
