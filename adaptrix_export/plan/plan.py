"""The plan: which parameters of a base change, and how, by reference to tensors on disk.

Nothing here reads a weight. A `Plan` is immutable; a pass takes one and returns another; lowering
turns one into bytes. Shapes are PyTorch's: a Linear weight is (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adaptrix_export.plan.adapter import Adapter, Adjustment, Prompt, Replacement
from adaptrix_export.plan.base import Base
from adaptrix_export.plan.composition import Composition
from adaptrix_export.plan.gate import Gate
from adaptrix_export.plan.loss import ApproximationLoss
from adaptrix_export.plan.site import Site
from adaptrix_export.plan.tensor import Tensor
from adaptrix_export.plan.terms import Term


@dataclass(frozen=True)
class Change:
    """The change of one tensor: the sum of `source`, with replaced `rows`, and of `terms`.

    `source` is the base's tensor or the one that replaces it. `transposed`: it is stored (in, out),
    like GPT-2's Conv1D and every embedding, so terms are transposed before they are added.
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
    # Measurements of passes, by section of the report.
    measured: Mapping[str, Any] = field(default_factory=dict)
    # The base weights that were not chosen, if available: the report compares with them.
    alternative: Base | None = None
    pooling: str | None = None  # output `sentence_embedding` of a features graph: "mean", "cls+max"
    # How several adapters were composed, unless they are summed; for the oracle.
    composition: Composition | None = None
    gates: tuple[Gate, ...] = field(default=())
    gate_stats: bool = False  # the graph has outputs with statistics of its gates
    # The adapters were moved onto a few layers: the artifact contains a copy of the result, and the
    # oracle is stock PEFT with that copy.
    redistributed: bool = False
    # Errors of adapters that were replaced by a LoRA approximation; the oracle has the LoRA, too.
    losses: tuple[ApproximationLoss, ...] = field(default=())

    def after(self, step: object, **changed: Any) -> Plan:
        """This plan with fields changed by `step`, whose repr becomes the history line."""
        return replace(self, history=(*self.history, repr(step)), **changed)

    def sites(self) -> tuple[Site, ...]:
        """Every site that some adapter changes, sorted."""
        sites = {d.site for a in self.adapters for d in a.deltas}
        sites |= {r.site for a in self.adapters for r in a.replacements}
        return tuple(sorted(sites, key=lambda s: s.order))

    @property
    def prompt(self) -> Prompt | None:
        """The learned prompt of the one adapter that has one (see `load.fit.invariants`)."""
        return next((a.prompt for a in self.adapters if a.prompt is not None), None)

    def gated(self) -> dict[Site, Gate]:
        """The sites whose gates depend on the data, so that they cannot be merged; in order."""
        gates = (gate for gate in self.gates if gate.depends_on_data)
        return {gate.site: gate for gate in sorted(gates, key=lambda g: g.site.order)}

    def merged(self) -> Plan:
        """This plan without the deltas of its gated sites, which are not merged."""
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
        """Tensor name -> its change. Deltas of several adapters at one site are summed.

        A tied tensor that is changed alone becomes untied (see `untied`) and starts from the shared
        values. Shared replacements are applied first, since they change the shared values.
        """
        return dict(self._changes)

    @cached_property
    def _changes(self) -> dict[str, Change]:
        replacements = [r for a in self.adapters for r in a.replacements]
        shared: dict[str, Change] = {}
        for saved in (r for r in replacements if r.shared):
            home = self.base.tied.get(saved.name, saved.name)
            shared[home] = _with_replacement(
                shared.get(home) or self._start(home, saved.site, {}), saved
            )
        own: dict[str, Change] = {}
        blends = {g.site: g.weight for g in self.gates if g.weight is not None}
        for saved in (r for r in replacements if not r.shared):
            start = own.get(saved.name) or self._start(saved.name, saved.site, shared)
            own[saved.name] = _with_replacement(start, saved)
        for delta in (d for a in self.adapters for d in a.deltas):
            change = own.get(delta.name) or self._start(delta.name, delta.site, shared)
            blend = blends.get(delta.site, 1.0)
            own[delta.name] = replace(change, terms=change.terms + delta.terms, blend=blend)
        for name in self.untied():  # has the shared values, with changes that apply to all
            if name not in own and self.base.tied[name] in shared:
                site = self.base.architecture.site_of(name.rpartition(".")[0])
                own[name] = self._start(name, site, shared)
        return {**shared, **own}

    def _start(self, name: str, site: Site, shared: Mapping[str, Change]) -> Change:
        """A change without terms: of the base's tensor, or of the changed tensor that it shares."""
        home = self.base.tied.get(name, name)
        transposed = self.base.architecture.is_transposed(site)
        if home not in self.base.tensors:  # a head that only the adapter has
            saved = next(r for a in self.adapters for r in a.replacements if r.name == name)
            return Change(name, site, saved.tensor, transposed)
        if home in shared:
            return replace(shared[home], name=name, site=site, transposed=transposed)
        return Change(name, site, self.base.tensors[home], transposed)

    def added(self) -> tuple[str, ...]:
        """Names of tensors that only an adapter has, such as a new head."""
        shipped = {r.name for a in self.adapters for r in a.replacements}
        known = {*self.base.tensors, *self.base.tied}
        return tuple(sorted(shipped - known))

    def untied(self) -> tuple[str, ...]:
        """Names of tensors that are tied in the base and not in this plan.

        Changing either tensor alone unties them: a new `lm_head` must not change the embedding, nor
        the other way round, because PEFT's live model keeps them apart.
        """
        return self._untied

    @cached_property
    def _untied(self) -> tuple[str, ...]:
        own = {d.name for a in self.adapters for d in a.deltas}
        own |= {r.name for a in self.adapters for r in a.replacements if not r.shared}
        return tuple(n for n, source in self.base.tied.items() if n in own or source in own)


def _with_replacement(change: Change, saved: Replacement) -> Change:
    if saved.rows is None:
        return replace(change, source=saved.tensor)
    return replace(change, rows=(*change.rows, saved))


Pass = Callable[[Plan], Plan]
