"""Several adapters into one, by a method of `methods.py`: their exact sum, or something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptrix_export.errors import AdapterError, RecipeError, UnsupportedError
from adaptrix_export.plan import (
    Adapter,
    Composed,
    Delta,
    Part,
    Plan,
    Term,
    leaves,
    low_ranks,
)
from adaptrix_export.plan.composition import Composition, Weight, check_options
from adaptrix_export.plan.methods import METHODS, PEFT_ALIASES, SUMS
from adaptrix_export.plan.shares import shares_of


@dataclass(frozen=True, repr=False)
class Compose(Composition):
    """One adapter out of those of a plan; every site gets what the method makes of their deltas.

    A plan with one adapter gets no more than its weight: there is nothing to compose, so that
    every method is the identity on it at weight 1. In the same way an adapter that acts alone at a
    site is kept whole there, but for the rank of an svd form. The `peft-*` methods do as PEFT does.

    Raises UnsupportedError for what a method cannot take, AdapterError for weights that do not
    fit the plan, RecipeError for options without a meaning.
    """

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, plan: Plan) -> Plan:
        self._check_weights(plan)
        if len(plan.adapters) < 2 and self._weights_are_one:
            return plan
        for adapter in plan.adapters:
            self._check_adapter(adapter, several=len(plan.adapters) > 1)
        settled = self._settled(plan.adapters)
        deltas = []
        for shares in shares_of(plan).values():
            if terms := self._terms(plan, shares, settled.rank):
                deltas.append(replace(shares[0][1], terms=terms))
        composed = replace(
            plan.adapters[0],
            name="+".join(a.name for a in plan.adapters),
            files=tuple(f for a in plan.adapters for f in a.files),
            deltas=tuple(sorted(deltas, key=lambda d: (d.site.order, d.parameter))),
            replacements=tuple(r for a in plan.adapters for r in a.replacements),
        )
        return plan.after(self, adapters=(composed,), composition=None if self.plain else settled)

    @property
    def _weights_are_one(self) -> bool:
        return all(weight == Weight() for _, weight in self.weights)

    def _settled(self, adapters: Sequence[Adapter]) -> Composition:
        """The options as they are meant: a rank of None is the largest of the adapters' own."""
        rank = self.rank
        if METHODS[self.method].needs_rank and rank is None:
            terms = [t for a in adapters for d in a.deltas for t in d.terms]
            ranks = [t.lora_rank for t in terms if t.lora_rank is not None]
            rank = max(ranks, default=None)
        return Composition(self.method, self.weights, self.density, rank, self.election, self.seed)

    def _terms(
        self, plan: Plan, shares: Sequence[tuple[Adapter, Delta]], rank: int | None
    ) -> tuple[Term, ...]:
        """What the method makes of the deltas of one parameter."""
        delta = shares[0][1]
        parts = tuple(
            Part(adapter.name, tuple(leaves(share.terms)), self.weight(adapter.name, delta.site))
            for adapter, share in shares
        )
        if self.plain:
            return tuple(term for part in parts for term in part.terms)
        if len(plan.adapters) < 2:
            return _sum(delta.name, parts)
        if METHODS[self.method].acts_on == "factors" and self.method not in PEFT_ALIASES:
            _check_ranks(delta.name, parts)
            return (self._composed(self.method, delta.name, parts, None),)
        parts = tuple(part for part in parts if part.weight)
        acts = acting(PEFT_ALIASES.get(self.method, self.method), len(parts), delta, rank)
        if acts in SUMS or (acts == "svd" and rank is not None and _within(parts, rank)):
            return _sum(delta.name, parts)
        if METHODS[acts].needs_rank and rank is None:
            raise UnsupportedError(
                f"compose: {delta.name}", "no LoRA whose rank could be taken", "a rank",
                "set compose.rank",
            )  # fmt: skip
        return (self._composed(acts, delta.name, parts, rank),)

    def _composed(
        self, method: str, name: str, parts: tuple[Part, ...], rank: int | None
    ) -> Composed:
        return Composed(method, name, parts, self.effective_density, rank, self.election, self.seed)

    def _check_weights(self, plan: Plan) -> None:
        names = [adapter.name for adapter in plan.adapters]
        layers = {d.site.layer for a in plan.adapters for d in a.deltas if d.site.layer is not None}
        count = max((s.count for s in plan.base.architecture.stacks), default=0)
        for name, weight in self.weights:
            if name not in names:
                raise AdapterError(
                    f"compose.weights: {name}", "no such adapter", f"one of {', '.join(names)}"
                )
            for layer, _ in weight.layers:
                if not 0 <= layer < max(count, *layers, 0):
                    raise AdapterError(
                        f"compose.weights: {name}", f"layer {layer}", f"0 to {count - 1}"
                    )
        if len(names) < 2 and self.rank is not None:
            raise RecipeError(
                "compose.rank", "given with one adapter", "two or more",
                "one adapter is not composed; leave the rank out",
            )  # fmt: skip

    def _check_adapter(self, adapter: Adapter, several: bool) -> None:
        """What of one adapter the method cannot take."""
        for saved in adapter.replacements:
            weight = self.weight(adapter.name, saved.site)
            if weight != 1:
                raise UnsupportedError(
                    f"{adapter.name}: {saved.name}", f"shipped whole, with weight {weight:g}",
                    "weight 1", "a share of a replacement has no meaning; give it weight 1 there",
                )  # fmt: skip
        terms = [(d.name, term) for d in adapter.deltas for term in d.terms]
        if not self.plain and adapter.config.get("layer_replication"):
            raise UnsupportedError(
                adapter.name, f"layer_replication with method {self.method}",
                "method cat with every weight 1",
            )  # fmt: skip
        if self.plain and several and any(term.is_layer_made for _, term in terms):
            raise UnsupportedError(
                adapter.name, f"{adapter.config.get('peft_type')} beside another adapter",
                "LoRA adapters only, with method cat",
                "PEFT runs one after the other; method linear adds up what each does alone",
            )  # fmt: skip
        odd = [name for name, term in terms if not term.is_plain]
        if several and odd and METHODS[self.method].acts_on == "factors":
            raise UnsupportedError(
                f"{adapter.name}: {odd[0]}", f"more than LoRA factors with {self.method}",
                "plain LoRA, which is all that PEFT's formulas read",
                f"use {self.method.removeprefix('peft-').replace('-', '_')}",
            )  # fmt: skip


def acting(method: str, parts: int, delta: Delta, rank: int | None) -> str:
    """The method for one parameter: a bias has no rank, and one adapter nothing to be resolved."""
    vector = delta.parameter == "bias"
    if vector:
        matrix = METHODS[method].acts_on == "matrix"
        method = "linear" if matrix else method.removesuffix("_svd")
    if parts < 2:
        return "svd" if METHODS[method].truncates and rank is not None else "linear"
    return method


def _sum(name: str, parts: tuple[Part, ...]) -> tuple[Term, ...]:
    """w_1 D_1 + ... + w_n D_n: in the scales where they are factors, else as a term of its own."""
    terms = [term for part in parts for term in part.terms]
    if len(parts) == 1 and parts[0].weight == 1:
        return tuple(terms)
    if any(term.reads_base for term in terms):
        return (Composed("linear", name, parts),)
    return tuple(term.scaled_by(part.weight) for part in parts for term in part.terms)


def _within(parts: tuple[Part, ...], rank: int) -> bool:
    """Whether the sum of LoRA terms has no more than `rank` anyway."""
    terms = [term for part in parts for term in part.terms]
    ranks = [term.rank for term in low_ranks(terms)]
    return len(ranks) == len(terms) and sum(ranks) <= rank


def _check_ranks(name: str, parts: tuple[Part, ...]) -> None:
    """PEFT's formulas add A to A and B to B, of one LoRA each."""
    ranks = {t.rank for part in parts for t in low_ranks(part.terms)}
    single = all(len(part.terms) == 1 for part in parts)
    if len(ranks) > 1 or not single:
        raise UnsupportedError(
            f"compose: {name}", f"ranks {', '.join(map(str, sorted(ranks)))}",
            "one rank, as PEFT's formulas need", "use the method without `peft-`",
        )  # fmt: skip
