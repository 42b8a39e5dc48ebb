"""Context gates behind slots: a function node scales the contribution of an adapter.

    x -> MatMul A -> MatMul B -> d, cut by module \\
    x -> MatMul W ---------> y0, cut by module --> ai.adaptrix::Clamp(y0, d, mask) -> y

The nodes are those of `gates.py`. A graph has gates at the union of all adapters' sites. The
contribution is zero at modules that the active adapter does not change, and everywhere without an
adapter: y is then y0, bit for bit, whatever the gate. In a weighted mix the sum is gated.

Mode blend needs no node: its share is multiplied into the adapter's factors (`shares`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from adaptrix_export.graph.rewrite.gates import put_gates
from adaptrix_export.graph.rewrite.slot_sums import join
from adaptrix_export.graph.rewrite.slots import Branch
from adaptrix_export.graph.rewrite.taps import Range, Tap, columns_of, joined
from adaptrix_export.plan import Plan, Site


def shares(plan: Plan) -> dict[str, float]:
    """Path of a site -> the fixed factor (mode blend) of its delta."""
    return {gate.site.path: gate.weight for gate in plan.gates if gate.weight is not None}


def join_gated(
    plan: Plan, model: ir.Model, places: Mapping[Site, Tap], branches: Iterable[Branch]
) -> int:
    """Join the branches, those of gated sites through their gates; returns the number of gates.

    `places` has the tap of every site. Raises UnsupportedError for a site that cannot be gated in
    this graph. Either all sites of a slot are gated, or none: they belong to one layer.
    """
    gated = plan.gated()
    paths = {site.path for site in gated}
    behind, plain = list[Branch](), list[Branch]()
    for branch in branches:
        members = {member.site for member in branch.place.slot.members}
        (behind if members <= paths else plain).append(branch)
    join(model, plain, settle=not gated)  # the gates are wired to whole values
    if not gated:
        return 0
    taps = {site: places[site] for site in gated}
    put_gates(plan, model, taps, _contributions(model, taps, behind))
    return len(gated)


def _contributions(
    model: ir.Model, taps: Mapping[Site, Tap], branches: Iterable[Branch]
) -> dict[Site, ir.Value]:
    """What each site's slots contribute to it: (batch, tokens, outputs of the module)."""
    columns: dict[int, dict[Range, ir.Value]] = {}
    for branch in branches:
        place, slot, up = branch.place, branch.place.slot, branch.up()
        ranges = [member.columns for member in slot.members]
        name = f"{slot.name}.lora_parts"
        parts, cut = columns_of(model, up.outputs[0], slot.outputs, ranges, name)
        model.graph.extend([*branch.nodes, up, *cut])
        start = place.columns[0]
        by_columns = {(start + first, start + last): part for (first, last), part in parts.items()}
        columns.setdefault(id(place.value), {}).update(by_columns)
    contributions = {}
    for site, tap in taps.items():
        pieces = [columns[id(piece.value)][piece.columns] for piece in tap.pieces]
        contributions[site], together = joined(pieces, f"{site.path}.contribution")
        model.graph.extend(together)
    return contributions
