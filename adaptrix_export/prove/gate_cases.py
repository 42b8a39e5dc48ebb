"""Gates in the report: the graph's own nodes, and its statistics, against the oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.graph.rewrite.gate_functions import DOMAIN, FUNCTIONS
from adaptrix_export.oracle.encoded import encode_prefill
from adaptrix_export.oracle.gated import STATISTICS, Statistics, compare_statistics
from adaptrix_export.oracle.job import GateSpec, Job
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.plan import clamp_slope
from adaptrix_export.prove.cases import feed, padded_batch
from adaptrix_export.prove.subject import OnnxSubject, Subject
from adaptrix_export.runtime.layout import located

_WIDEST = 2**18  # outputs of a module


@dataclass(frozen=True)
class OracleGates:
    """The oracle's statistics: of the long prompt, and of the rows of the ragged batch.

    `rows` is None for an encoder, whose positions count pads: a padded row is another question.
    """

    prefill: Statistics
    rows: Statistics | None


def ask_gates(job: Job, reference: Reference, prompts: Prompts) -> OracleGates:
    """How far the gates are open: what the graph is to say of the same tokens; nothing where no
    gate depends on the data."""
    if not any(gate.depends_on_data for gate in job.gates):
        return OracleGates({}, None)
    if job.task != GENERATION:
        statistics = reference.gate_statistics(lambda model: encode_prefill(model, prompts))
        return OracleGates(statistics, None)
    prefill = reference.gate_statistics(lambda model: model.prefill(list(prompts.prefill)))
    rows = _first(prompts)
    alone = reference.gate_statistics(lambda model: [model.prefill(list(row)) for row in rows])
    return OracleGates(prefill, alone)


def _first(prompts: Prompts) -> list[tuple[int, ...]]:
    """The rows of the ragged batch that are fed in one call, before single tokens follow."""
    return [row[: len(row) - prompts.cached] for row in prompts.rows]


def compare_gates(
    job: Job,
    subject: Subject,
    prompts: Prompts,
    oracle: OracleGates,
    places: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The report's `context`: a line a site with the oracle's statistics on the long prompt, and
    what was compared: the graph's nodes with the plan, and statistics where the graph gives any.

    A batch with padding on either side must give the statistics of its rows alone. `places` are
    those of the job's gates among the graph's statistics, where the graph has other gates, too.
    """
    gates = [gate for gate in job.gates if gate.depends_on_data]
    entry: dict[str, Any] = {"sites": [], "checks": [], "passed": True}
    for number, gate in enumerate(gates):
        line = {name: float(f"{values[number]:.4g}") for name, values in oracle.prefill.items()}
        entry["sites"].append({"site": gate.site, "mode": gate.mode, "tau": gate.tau, **line})
    blended = (gate for gate in job.gates if not gate.depends_on_data)
    entry["sites"] += [{"site": g.site, "mode": g.mode, "weight": g.weight} for g in blended]
    if not gates:
        return entry
    if job.is_graph and job.facts.composes:
        entry["checks"].append(function_nodes(job))
    if isinstance(subject, OnnxSubject):
        entry["checks"] += _statistics(job, subject, prompts, oracle, places)
    entry["passed"] = all(check["passed"] for check in entry["checks"])
    return entry


def _statistics(
    job: Job,
    subject: OnnxSubject,
    prompts: Prompts,
    oracle: OracleGates,
    places: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """Empty where the graph gives no statistics and none are wanted."""
    if oracle.rows is None:
        encode_prefill(subject, prompts)
    else:
        feed(subject, [prompts.prefill])
    missing = [name for name in STATISTICS if name not in subject.statistics]
    if missing:
        wrong = {"name": f"statistics, no {', '.join(missing)}", "count": 0, "passed": False}
        return [wrong] if job.gate_stats or subject.statistics else []
    statistics = [("statistics, prefill", oracle.prefill, subject.statistics, len(prompts.prefill))]
    rows = _first(prompts)
    for left in (True, False) if oracle.rows is not None else ():
        assert oracle.rows is not None
        ids, mask, positions = padded_batch(rows, left=left)
        subject.step(ids, mask, positions, None)
        name = f"statistics, {'left' if left else 'right'}-padded"
        statistics.append((name, oracle.rows, subject.statistics, int(mask.sum())))
    return [
        {"name": name, **compare_statistics(oracle_values, _among(graph_values, places), tokens)}
        for name, oracle_values, graph_values, tokens in statistics
    ]


def _among(statistics: Statistics, places: Sequence[int] | None) -> Statistics:
    """The statistics at these places, or all."""
    if places is None:
        return statistics
    return {name: [values[place] for place in places] for name, values in statistics.items()}


def function_nodes(job: Job) -> dict[str, Any]:
    """One function node a gated site, of its kind and with its tau, and no other."""
    import onnx_ir as ir

    gates = {gate.site: gate for gate in job.gates if gate.depends_on_data}
    nodes = {
        n.name: n for n in ir.load(located(job.artifact, "model.onnx")).graph if n.domain == DOMAIN
    }
    passed = gates.keys() == nodes.keys() and all(
        _is_node_of(gate, nodes[site]) for site, gate in gates.items()
    )
    return {"name": "function nodes", "count": len(nodes), "passed": passed}


def _is_node_of(gate: GateSpec, node: Any) -> bool:
    tau = node.attributes.get("tau")
    if node.op_type != FUNCTIONS[gate.mode][0] or (tau is None) != (gate.tau is None):
        return False
    if gate.tau is None:
        return True
    # the widest output that there is has the smallest slope, 2% below
    return bool(clamp_slope(gate.tau, _WIDEST) <= cast(float, tau.value) <= np.float32(gate.tau))
