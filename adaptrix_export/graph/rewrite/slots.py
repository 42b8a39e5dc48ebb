"""Adapter slots in a base graph: where they are, and the values of an adapter for them.

    x -> MatMul W ----------------------------> y0 \
    x -> MatMul A (inputs, r) -> times B (r, outputs) -> sum -> y      see `slot_sums.py`

A and B are overridable initializers: graph inputs whose default has rank 0, so that a run without
an adapter computes the base. Each module has its own slot, also where the graph packs query, key
and value into one MatMul: a B for all three would be two thirds zeros. B includes the scale.

With one adapter for each row of a batch, the factors of all adapters are concatenated along the
rank and stored as weights instead, and ranks that belong to another adapter than the row's are
multiplied by zero. There a slot belongs to a value of the graph: the A of the modules packed in it
are concatenated, too, and their B are the blocks of a larger one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.graph.rewrite.taps import Range, Tap
from adaptrix_export.plan import Adapter, Array, Delta, LowRank, Plan, Replacement, Site, low_ranks
from adaptrix_export.runtime.graph import ADAPTER_IDS

NO_SHARES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Member:
    """Outputs `rows` of a module are columns `columns` of the slot's value."""

    site: str
    columns: Range
    rows: Range


@dataclass(frozen=True)
class Slot:
    """A pair of inputs, `<name>.lora_A` (inputs, r) and `<name>.lora_B` (r, outputs)."""

    name: str
    inputs: int
    outputs: int
    members: tuple[Member, ...]

    @property
    def a(self) -> str:
        return f"{self.name}.lora_A"

    @property
    def b(self) -> str:
        return f"{self.name}.lora_B"

    def as_dict(self) -> dict[str, object]:
        """For the graph's metadata and the manifest; `from_dict` is its inverse."""
        members = [[m.site, list(m.columns), list(m.rows)] for m in self.members]
        return {
            "name": self.name, "a": self.a, "b": self.b, "inputs": self.inputs,
            "outputs": self.outputs, "members": members,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, entry: Mapping[str, object]) -> Slot:
        members = tuple(
            Member(site, tuple(columns), tuple(rows))
            for site, columns, rows in entry["members"]  # type: ignore[attr-defined]
        )
        return cls(str(entry["name"]), entry["inputs"], entry["outputs"], members)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Place:
    """Where a slot is wired: it reads `x` and adds to columns `columns` of `value`, of `width`."""

    slot: Slot
    x: ir.Value
    value: ir.Value
    columns: Range
    width: int

    @property
    def is_whole(self) -> bool:
        return self.columns == (0, self.width)


def check_slots(plan: Plan) -> None:
    """Refuse all changes but low-rank terms on weights of linear layers, the only ones slots
    take."""
    base = plan.base
    if base.task != GENERATION:
        raise UnsupportedError(
            f"{base.spec}: task {base.task}", "no slots for adapters", GENERATION,
            "merge the adapter (target onnx)",
        )  # fmt: skip
    for adapter in plan.adapters:
        changes: tuple[Replacement | Delta, ...] = (*adapter.replacements, *adapter.deltas)
        for change in changes:
            reason = _unsupported_reason(change)
            if base.architecture.is_embedding(change.site):
                reason = "an embedding"
            if reason:
                raise UnsupportedError(
                    f"{adapter.name}: {change.name}", f"{reason}, which no slot can hold",
                    "plain LoRA on the weights of linear layers",
                    "merge this adapter (target onnx), or approximate its deltas "
                    "(slots.approximate=svd)",
                )  # fmt: skip


def is_plain(adapter: Adapter) -> bool:
    """Whether all that the adapter ships are low-rank deltas of weights."""
    changes: tuple[Replacement | Delta, ...] = (*adapter.replacements, *adapter.deltas)
    return not any(map(_unsupported_reason, changes))


def _unsupported_reason(change: Delta | Replacement) -> str:
    """What the change is, if a slot cannot express it; else an empty string."""
    if isinstance(change, Replacement):
        return "a trained row or bias" if change.shared else "a module saved whole"
    if change.parameter != "weight":
        return f"a trained {change.parameter}"
    kinds = [t for t in change.terms if not t.is_plain]
    return f"{getattr(kinds[0], 'kind', type(kinds[0]).__name__)}" if kinds else ""


def sites_of(adapters: Iterable[Adapter]) -> tuple[Site, ...]:
    """The union of the adapters' sites, sorted."""
    sites = {delta.site for adapter in adapters for delta in adapter.deltas}
    return tuple(sorted(sites, key=lambda site: site.order))


def places_of(taps: Mapping[Site, Tap]) -> list[Place]:
    """A place for each module, in the order of the sites; one for each part of a split module."""
    places = []
    for site, tap in taps.items():
        for piece in tap.pieces:
            size = piece.columns[1] - piece.columns[0]
            member = Member(site.path, (0, size), piece.rows)
            slot = Slot(_name([member]), tap.inputs, size, (member,))
            places.append(Place(slot, tap.x, piece.value, piece.columns, piece.width))
    return _require_unique_names(places)


def packed_places_of(taps: Mapping[Site, Tap]) -> list[Place]:
    """A place for each value of the graph that sites are packed in, in the order of the sites."""
    values: dict[int, tuple[ir.Value, ir.Value, int, int]] = {}
    members: dict[int, list[Member]] = {}
    for site, tap in taps.items():
        for piece in tap.pieces:
            key = id(piece.value)
            values.setdefault(key, (tap.x, piece.value, tap.inputs, piece.width))
            members.setdefault(key, []).append(Member(site.path, piece.columns, piece.rows))
    places = []
    for key, (x, value, inputs, outputs) in values.items():
        slot_members = tuple(sorted(members[key], key=lambda m: m.columns))
        slot = Slot(_name(slot_members), inputs, outputs, slot_members)
        places.append(Place(slot, x, value, (0, outputs), outputs))
    return _require_unique_names(places)


def _require_unique_names(places: list[Place]) -> list[Place]:
    """The places, or UnsupportedError where two have one name."""
    counted = Counter(place.slot.name for place in places)
    twice = next((name for name, count in counted.items() if count > 1), None)
    if twice is not None:
        raise UnsupportedError(
            f"{twice} in the graph", "two values of that name", "a slot for each",
            "merge the adapter (target onnx)",
        )  # fmt: skip
    return places


def _name(members: Sequence[Member]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj`; with `@row` for a part of a split module."""
    first = members[0].site
    stem = first.rpartition(".")[0]
    parts = [m.site.removeprefix(f"{stem}.") for m in members]
    name = (f"{stem}." if stem else "") + "+".join(dict.fromkeys(parts))
    start = members[0].rows[0]
    return f"{name}@{start}" if start else name


@dataclass(frozen=True)
class Branch:
    """The side branch of a slot up to A: `nodes`, in order, not in the graph yet, whose last output
    is to be multiplied by `b`.

    `masked`: rows have their own adapters. Make the branches of all places before joining any: one
    place may read the output of another, and must read it with the contribution added.
    """

    place: Place
    nodes: tuple[ir.Node, ...]
    b: ir.Value
    masked: bool = False

    def up(self) -> ir.Node:
        """The node that multiplies by B: (batch, tokens, outputs), in the shape of the value."""
        return node(
            "MatMul", [self.nodes[-1].outputs[0], self.b], f"{self.place.slot.name}.lora_up"
        )


def slot_branches(model: ir.Model, places: Iterable[Place]) -> list[Branch]:
    """Slots as graph inputs. With the default values the graph is the base, bit for bit."""
    branches = []
    for place in places:
        slot = place.slot
        rank = f"{slot.name}.rank"
        a = _input(model, slot.a, [slot.inputs, rank], (slot.inputs, 0))
        b = _input(model, slot.b, [rank, slot.outputs], (0, slot.outputs))
        down = node("MatMul", [place.x, a], f"{slot.name}.lora_down")
        branches.append(Branch(place, (down,), b))
    return branches


def row_branches(
    model: ir.Model,
    places: Iterable[Place],
    values: Mapping[str, Array],
    ranks: Mapping[str, Array],
) -> list[Branch]:
    """Slots of all adapters as weights, and the input `adapter_ids` (batch,) that selects one a
    row.

    `values` are the stacked factors by name; `ranks` has, for each slot, the index of the adapter
    that each rank belongs to. Id -1 selects the base.
    """
    graph = model.graph
    ids = ir.Value(
        name=ADAPTER_IDS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.inputs.append(ids)
    masks: dict[bytes, ir.Value] = {}
    first: list[ir.Node] = []
    branches = []
    for place in places:
        slot, owners = place.slot, ranks[place.slot.name]
        a, b = (_constant(model, name, values[name]) for name in (slot.a, slot.b))
        if owners.tobytes() not in masks:
            masks[owners.tobytes()] = _row_mask(model, ids, owners, len(masks), first)
        down = node("MatMul", [place.x, a], f"{slot.name}.lora_down")
        own = node("Mul", [down.outputs[0], masks[owners.tobytes()]], f"{slot.name}.lora_own")
        branches.append(Branch(place, (down, own), b, masked=True))
    graph.insert_before(graph[0], first)
    return branches


def _row_mask(
    model: ir.Model, ids: ir.Value, owners: Array, number: int, nodes: list[ir.Node]
) -> ir.Value:
    """(batch, 1, ranks): 1 where a rank belongs to the row's adapter. The last row of the table is
    the base's, selected by id -1."""
    count = int(owners.max()) + 1 if owners.size else 0
    table = np.zeros((count + 1, 1, owners.size), np.float32)
    for adapter in range(count):
        table[adapter, 0] = owners == adapter
    values = _constant(model, f"adapter_rows.{number}", table)
    chosen = node("Gather", [values, ids], f"adapter_rows.{number}.mask")
    nodes.append(chosen)
    return chosen.outputs[0]


def node(kind: str, inputs: list[ir.Value], name: str) -> ir.Node:
    """A node whose output has its name."""
    made = ir.node(kind, inputs, name=name)
    made.outputs[0].name = name
    return made


def _input(
    model: ir.Model, name: str, shape: list[int | str], default: tuple[int, int]
) -> ir.Value:
    constant = ir.tensor(np.zeros(default, np.float32), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=constant,
    )  # fmt: skip
    model.graph.inputs.append(value)
    model.graph.initializers[name] = value
    return value


def _constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    constant = ir.tensor(np.ascontiguousarray(array, dtype=np.float32), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=constant,
    )  # fmt: skip
    model.graph.initializers[name] = value
    return value


def slot_values(
    slots: Iterable[Slot], adapter: Adapter, shares: Mapping[str, float] = NO_SHARES
) -> dict[str, Array]:
    """The tensors of an adapter by input name; slots that it does not fill are left out.

    scale * B, times the site's share in `shares` if it has one, is computed in float64 and rounded
    once. Raises AdapterError for a site without a slot.
    """
    deltas = {delta.site.path: delta for delta in adapter.deltas}
    values: dict[str, Array] = {}
    placed = set[str]()
    for slot in slots:
        parts: list[tuple[Array, Array]] = []
        for member in slot.members:
            delta = deltas.get(member.site)
            if delta is not None:
                placed.add(member.site)
                # `check_slots` refused all other terms
                plain = low_ranks(delta.terms)
                share = shares.get(member.site, 1.0)
                parts += [_block(slot, member, term, share) for term in plain]
        if parts:
            values[slot.a] = np.concatenate([a for a, _ in parts], axis=1)
            values[slot.b] = np.concatenate([b for _, b in parts], axis=0)
    missing = sorted(set(deltas) - placed)
    if missing:
        raise AdapterError(
            f"{adapter.name}: {missing[0]}", "no slot in this graph",
            "a site that an adapter of the build has", "build again with this adapter",
        )  # fmt: skip
    return values


def _block(slot: Slot, member: Member, term: LowRank, share: float) -> tuple[Array, Array]:
    """(inputs, r) and (r, outputs) of one term, zero outside the member's columns."""
    a = term.a.read().astype(np.float32).T
    scaled = (share * term.scale * term.b.read().astype(np.float64)).astype(np.float32)
    b = np.zeros((term.rank, slot.outputs), np.float32)
    b[:, slice(*member.columns)] = scaled[slice(*member.rows)].T
    return np.ascontiguousarray(a), b


def stacked(
    slots: Iterable[Slot], adapters: Sequence[Adapter], shares: Mapping[str, float] = NO_SHARES
) -> tuple[dict[str, Array], dict[str, Array]]:
    """For `row_branches`: the concatenated factors of all adapters, and each rank's adapter."""
    each = [slot_values(slots, adapter, shares) for adapter in adapters]
    values: dict[str, Array] = {}
    owners: dict[str, Array] = {}
    for slot in slots:
        owning = [(n, v) for n, v in enumerate(each) if slot.a in v]
        values[slot.a] = np.concatenate([v[slot.a] for _, v in owning], axis=1)
        values[slot.b] = np.concatenate([v[slot.b] for _, v in owning], axis=0)
        owners[slot.name] = np.concatenate(
            [np.full(v[slot.a].shape[1], n, np.int64) for n, v in owning]
        )
    return values, owners


def base_plan(plan: Plan) -> Plan:
    """The plan of the base graph that the slots are put into."""
    return Plan(plan.base, (), alternative=plan.alternative)
