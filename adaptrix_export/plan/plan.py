"""The data that everything else works on: what changes where, by reference to tensors on disk.

Nothing here reads a weight. A `Plan` is immutable; a pass takes one and returns another; lowering
turns one into bytes. Shapes are written as PyTorch has them: a Linear weight is (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adaptrix_export.plan.adapter import Adapter, Adjustment, Replacement
from adaptrix_export.plan.base import Base
from adaptrix_export.plan.composition import Composition
from adaptrix_export.plan.gate import Gate
from adaptrix_export.plan.loss import ApproximationLoss
from adaptrix_export.plan.site import Site
from adaptrix_export.plan.tensor import Tensor
from adaptrix_export.plan.terms import Term


@dataclass(frozen=True)
class Change:
    """All that happens to one tensor: `source` taken, some rows of it set, terms added.

    `source` is the base's tensor or the one that replaces it. `transposed` says that it is stored
    (in, out), as GPT-2's Conv1D and every embedding are, so that a term is transposed, too.
    """

    name: str
    site: Site
    source: Tensor
    transposed: bool
    terms: tuple[Term, ...] = ()
    rows: tuple[Replacement, ...] = ()
    blend: float = 1.0  # share of the terms' sum that is added

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True)
class Plan:
    """Base, adapters, and what the passes did, in order."""

    base: Base
    adapters: tuple[Adapter, ...]
    history: tuple[str, ...] = field(default=())
    adjustments: tuple[Adjustment, ...] = field(default=())
    # What passes measured, by the name of its section in the report.
    measured: Mapping[str, Any] = field(default_factory=dict)
    # The base weights that were not chosen, when they are at hand: the report tells how far off.
    alternative: Base | None = None
    pooling: str | None = None  # a graph of features gives one vector a row, too: "mean", "cls+max"
    # How several adapters became one, unless they simply add up: the oracle then needs to know.
    composition: Composition | None = None
    gates: tuple[Gate, ...] = field(default=())
    gate_stats: bool = False  # the graph tells how far its gates were open
    # The adapters are no longer those of the files, but moved onto a few layers: an artifact keeps
    # a copy of them, and is proved against stock PEFT on that.
    redistributed: bool = False
    # Of the adapters that were replaced by the nearest LoRA, which is what they are proved against.
    losses: tuple[ApproximationLoss, ...] = field(default=())

    def after(self, step: object, **changed: Any) -> Plan:
        """This plan with fields changed by `step`, whose repr becomes the history line."""
        return replace(self, history=(*self.history, repr(step)), **changed)

    def sites(self) -> tuple[Site, ...]:
        """Every site that some adapter changes, sorted."""
        found = {d.site for a in self.adapters for d in a.deltas}
        found |= {r.site for a in self.adapters for r in a.replacements}
        return tuple(sorted(found, key=lambda s: s.order))

    def gated(self) -> dict[Site, Gate]:
        """The sites that cannot be merged, because their gates depend on the data; in order."""
        found = (gate for gate in self.gates if gate.depends_on_data)
        return {gate.site: gate for gate in sorted(found, key=lambda g: g.site.order)}

    def merged(self) -> Plan:
        """What is merged of this plan: all but the deltas of its gated sites."""
        gated = self.gated()
        if not gated:
            return self
        adapters = (
            replace(a, deltas=tuple(d for d in a.deltas if d.site not in gated))
            for a in self.adapters
        )
        return replace(self, adapters=tuple(adapters), gates=tuple(
            gate for gate in self.gates if not gate.depends_on_data
        ))  # fmt: skip

    def changes(self) -> dict[str, Change]:
        """Tensor name -> what happens to it. Two adapters on one site add up.

        A tensor that was tied and is changed by itself is tied no longer (see `untied`): it
        starts from the values that it shared. Shared replacements come first: they change what
        is shared.
        """
        return dict(self._changes)

    @cached_property
    def _changes(self) -> dict[str, Change]:
        replacements = [r for a in self.adapters for r in a.replacements]
        shared: dict[str, Change] = {}
        for saved in (r for r in replacements if r.shared):
            home = self.base.tied.get(saved.name, saved.name)
            shared[home] = _replaced(shared.get(home) or self._start(home, saved.site, {}), saved)
        own: dict[str, Change] = {}
        blends = {g.site: g.weight for g in self.gates if g.weight is not None}
        for saved in (r for r in replacements if not r.shared):
            start = own.get(saved.name) or self._start(saved.name, saved.site, shared)
            own[saved.name] = _replaced(start, saved)
        for delta in (d for a in self.adapters for d in a.deltas):
            change = own.get(delta.name) or self._start(delta.name, delta.site, shared)
            blend = blends.get(delta.site, 1.0)
            own[delta.name] = replace(change, terms=change.terms + delta.terms, blend=blend)
        for name in self.untied():  # keeps what it shared, also where that was changed for all
            if name not in own and self.base.tied[name] in shared:
                site = self.base.architecture.site_of(name.rpartition(".")[0])
                own[name] = self._start(name, site, shared)
        return {**shared, **own}

    def _start(self, name: str, site: Site, shared: Mapping[str, Change]) -> Change:
        """The starting point of a change: the base's tensor, or what became of what it shares."""
        home = self.base.tied.get(name, name)
        transposed = self.base.architecture.is_transposed(site)
        if home not in self.base.tensors:  # a head that the adapter brings along
            saved = next(r for a in self.adapters for r in a.replacements if r.name == name)
            return Change(name, site, saved.tensor, transposed)
        if home in shared:
            return replace(shared[home], name=name, site=site, transposed=transposed)
        return Change(name, site, self.base.tensors[home], transposed)

    def added(self) -> tuple[str, ...]:
        """Tensor names that the base lacks: a head that only the adapter ships."""
        shipped = {r.name for a in self.adapters for r in a.replacements}
        known = {*self.base.tensors, *self.base.tied}
        return tuple(sorted(shipped - known))

    def untied(self) -> tuple[str, ...]:
        """Tensor names that the base shares and that this plan gives values of their own.

        Changing either end by itself unties: a new `lm_head` must not reach the embedding, nor
        the other way round, because PEFT's live model keeps them apart.
        """
        return self._untied

    @cached_property
    def _untied(self) -> tuple[str, ...]:
        own = {d.name for a in self.adapters for d in a.deltas}
        own |= {r.name for a in self.adapters for r in a.replacements if not r.shared}
        return tuple(n for n, source in self.base.tied.items() if n in own or source in own)


def _replaced(change: Change, saved: Replacement) -> Change:
    if saved.rows is None:
        return replace(change, source=saved.tensor)
    return replace(change, rows=(*change.rows, saved))


Pass = Callable[[Plan], Plan]
