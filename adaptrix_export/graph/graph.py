"""Front ends: a plan in, an ONNX graph out whose weights are expressions, not values.

A front end is a row of `FRONTENDS`. None of them is trusted: `draw` checks one on a small model of
the same kind before it is used, and the parity check that follows every build decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress


@dataclass(frozen=True)
class Graph:
    """What a front end draws, in float32, with the interface of the package's README.

    `weights`: initializer name -> expression over base tensor names, for every initializer of
    `model` that has no constant value. `unused`: base tensors that the graph does not read.
    `reason` says why `auto` took this front end, where it had a choice.
    """

    model: ir.Model
    weights: Mapping[str, Expression]
    frontend: str
    unused: tuple[str, ...]
    reason: str | None = None


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
UNCHECKED = "unchecked:"  # before a front end's name: for the process that does the checking


def draw(plan: Plan, provider: str, frontend: str, progress: Progress) -> Graph:
    """The graph of `plan` for an execution provider, by the front end of that name or by `auto`.

    `native` is tried on a small replica first (`prove/preflight/preflight.py`); where it fails,
    `auto` traces instead. Raises UnsupportedError where the front end cannot draw it, or draws
    it wrongly.
    """
    if frontend.startswith(UNCHECKED):
        return FRONTENDS[frontend.removeprefix(UNCHECKED)](plan, provider, progress)
    if frontend == "traced":
        return FRONTENDS[frontend](plan, provider, progress)
    try:
        _check_native(plan, provider, progress)
        return FRONTENDS["native"](plan, provider, progress)
    except UnsupportedError as error:
        if frontend != AUTO:
            raise
        reason = f"native: {error.found}"
    progress.note(f"front end traced, not {reason}")
    return replace(FRONTENDS["traced"](plan, provider, progress), reason=reason)


def _check_native(plan: Plan, provider: str, progress: Progress) -> None:
    """Raise UnsupportedError where the native front end cannot be trusted with this plan."""
    from adaptrix_export.graph.frontends.native import REMEDY, check_known
    from adaptrix_export.prove.preflight.preflight import preflight

    check_known(plan)
    with progress.stage("trying the native front end on a small replica"):
        verdict = preflight(plan, provider, "native", progress)
    if not verdict.passed:
        kind = plan.base.architecture.model_type
        raise UnsupportedError(
            f"{plan.base.spec}: front end native, model type {kind!r}", verdict.why,
            "what PyTorch computes", REMEDY,
        )  # fmt: skip


def draw_parts(plan: Plan, provider: str, frontend: str, progress: Progress) -> dict[str, Graph]:
    """The graphs of an encoder-decoder by file name; only the traced front end draws them.

    Raises UnsupportedError where another is asked for, and what that one raises.
    """
    if frontend not in (AUTO, "traced"):
        raise UnsupportedError(
            f"{plan.base.spec}: task {plan.base.task}", f"front end {frontend}", "traced",
            "leave the front end to auto",
        )  # fmt: skip
    from adaptrix_export.graph.frontends.traced_parts import traced_parts

    parts = traced_parts(plan, provider, progress)
    if frontend == AUTO:
        reason = "an encoder-decoder, which the native front end does not draw"
        parts = {file: replace(graph, reason=reason) for file, graph in parts.items()}
    return parts
