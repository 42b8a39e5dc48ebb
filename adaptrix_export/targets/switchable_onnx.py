"""Target `onnx-switchable`: the base's graph with slots, and a file for each adapter.

Beside it lies the graph without slots, over the same weights file, for a runtime that does not want
to pay for slots while no adapter is in them. With rows, the adapters are in the graph, side by
side, and every row of a batch chooses its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrix_export.arch.config_changes import config_changes
from adaptrix_export.graph.frontends.draw import AUTO, Trial, draw
from adaptrix_export.graph.rewrite.facts import state_facts
from adaptrix_export.graph.rewrite.gated_slots import join_gated, shares
from adaptrix_export.graph.rewrite.slots import (
    NO_SHARES,
    Slot,
    base_plan,
    check_slots,
    packed_places_of,
    places_of,
    row_branches,
    sites_of,
    slot_branches,
    slot_values,
    stacked,
)
from adaptrix_export.graph.rewrite.taps import taps
from adaptrix_export.passes.quantize.quantizing import quantizing
from adaptrix_export.plan import Adapter, Array, Plan
from adaptrix_export.precision.settings import Quantization
from adaptrix_export.progress import Progress
from adaptrix_export.runtime.adapters import FOLDER, SUFFIX
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.runtime.stamps import model_version
from adaptrix_export.targets.adapter_file import write_adapter, write_web_adapter
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.merged_onnx import (
    DATA,
    MODEL,
    Values,
    note_unused,
    store_floats,
    write_data,
    write_model,
)

TARGET = "onnx-switchable"


def lower_switchable_onnx(
    plan: Plan,
    stage: Path,
    progress: Progress,
    frontend: str = AUTO,
    rows: bool = False,
    provider: str = "cpu",
    trial: Trial | None = None,
    quantization: Quantization | None = None,
    precision: str = "fp32",
) -> Artifact:
    """Write the base graph with slots for the union of all adapters' sites, and the adapters.

    The base may be quantized; what slots add to it stays float.

    Raises UnsupportedError for an adapter, or a site, that no slot can hold.
    """
    check_slots(plan)
    alone = base_plan(plan)
    names = [adapter.name for adapter in plan.adapters]
    graph = draw(alone, provider, frontend, progress, trial)
    graphs = {MODEL: graph}
    if not rows:
        graphs[SLOTLESS] = replace(graph, model=graph.model.clone())
    with progress.stage("slots"):
        tapped = taps(alone, graph, sites_of(plan.adapters))
        places = packed_places_of(tapped) if rows else places_of(tapped)
        slots = [place.slot for place in places]
        owners: dict[str, Array] = {}
        if rows:
            values, owners = stacked(slots, plan.adapters, shares(plan))
            branches = row_branches(graph.model, places, values, owners)
        else:
            branches = slot_branches(graph.model, places)
        join_gated(plan, graph.model, tapped, branches)
    read = Values(alone)
    with quantizing(quantization, graphs, alone, read, progress) as quantized:
        graphs = dict(quantized.graphs)
        store_floats(graphs, alone, precision)
        hashes = {DATA: write_data(read, graphs, stage / DATA, progress)}
        entries = [slot.as_dict() for slot in slots]
        gates = [(gate.site.path, gate.mode, gate.tau, gate.weight) for gate in plan.gates]
        parts = (plan.base.architecture.model_type, hashes[DATA], entries)
        version = model_version(*parts, *([gates] if gates else []))
        facts: dict[str, Any] = {"slots": entries}
        if rows:
            ranks = [{**slot.as_dict(), "owners": owners[slot.name].tolist()} for slot in slots]
            facts = {"rows": names, "row_slots": ranks}
        state_facts(graph.model, model_version=version, **facts)
        if SLOTLESS in graphs:
            state_facts(graphs[SLOTLESS].model)
        for file, one in graphs.items():
            hashes[file] = write_model(one.model, plan.base, stage / file)
    note_unused((graph,), progress)
    switchable: dict[str, Any] = {"model_version": version, "slots": entries, "rows": rows}
    switchable["adapters"] = {}
    if rows:
        switchable["adapters"] = {name: {} for name in names}
    else:
        with progress.stage("adapters"):
            (stage / FOLDER).mkdir()
            for adapter in plan.adapters:
                entry, digest = add_adapter_file(stage, slots, adapter, version, shares(plan))
                hashes[entry["file"]] = digest
                switchable["adapters"][adapter.name] = entry
    return Artifact(
        folder=stage,
        target=TARGET,
        precision=quantization.precision if quantization else precision,
        hashes=hashes,
        weights=dict(sorted(graphs[MODEL].weights.items())),
        quantized=quantized.entries,
        kept_float=quantized.kept_float,
        untied=(),
        config_changes=config_changes(alone),
        frontend=graph.frontend,
        frontend_reason=graph.reason,
        gates=plan.gates,
        gate_stats=plan.gate_stats,
        switchable=switchable,
    )


def add_adapter_file(
    folder: Path,
    slots: Sequence[Slot],
    adapter: Adapter,
    version: int,
    shared: Mapping[str, float] = NO_SHARES,
) -> tuple[dict[str, Any], str]:
    """Write one adapter that passed `check_slots`; returns its manifest entry and the sha256.

    `shared` says which share of its delta goes through at a site, 1 at all others.
    """
    values = slot_values(slots, adapter, shared)
    file = f"{FOLDER}/{adapter.name}{SUFFIX}"
    stamp, digest = write_adapter(folder / file, values, version)
    entry = {
        "file": file,
        "safetensors": write_web_adapter(folder, adapter.name, values, version),
        "version": stamp,
        "parameters": adapter.parameters,
        "values": sum(int(array.size) for array in values.values()),
    }
    return entry, digest
