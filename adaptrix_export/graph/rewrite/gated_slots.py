"""Context gates behind slots: what an adapter contributes is let through by a function node.

    x -> MatMul A -> MatMul B -> d, cut by module \\
    x -> MatMul W ---------> y0, cut by module --> ai.adaptrix::Clamp(y0, d, mask) -> y

The nodes are those of `gates.py`. A graph has gates at the union of all adapters' sites. A module
that the adapter at hand leaves alone has a contribution of zeros, and so has every module while
there is no adapter: y is then y0, bit for bit, however far the gate is open. Of a weighted mix the
sum is gated.

Mode blend needs no node: its share is in the adapter's own factors (`shares`).
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
    """Path of a site -> the fixed share of its delta that is let through."""
    return {gate.site.path: gate.weight for gate in plan.gates if gate.weight is not None}


def join_gated(
    plan: Plan, model: ir.Model, places: Mapping[Site, Tap], branches: Iterable[Branch]
) -> int:
    """Join the branches, those of gated sites through their gates; returns how many gates.

    `places` has the tap of every site. Raises UnsupportedError for one that cannot be gated in
    this graph. The sites of a slot are all gated, or none is: they are of one layer.
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
        found = {(start + first, start + last): part for (first, last), part in parts.items()}
        columns.setdefault(id(place.value), {}).update(found)
    contributions = {}
    for site, tap in taps.items():
        pieces = [columns[id(piece.value)][piece.columns] for piece in tap.pieces]
        contributions[site], together = joined(pieces, f"{site.path}.contribution")
        model.graph.extend(together)
    return contributions
