"""An adapter moved onto a few layers, and a report of what that lost.

The result is a standard PEFT adapter: low-rank terms at the target layers in place of all deltas
of the stack. What the adapter changes outside the stack (embeddings, head, a classifier) stays as
it is. An adapter that touches the target layers only is left as it is.

Beside lowering this is the one place that reads weights: the models run, to fit and to measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrix_export.arch.tasks import CLASSIFIERS, FEATURES, GENERATION
from adaptrix_export.errors import FidelityError, RecipeError, UnsupportedError
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.load.files.tensors import itemsize
from adaptrix_export.measure.calibration import AUTO, PYDOC, Calibration, calibration_rows
from adaptrix_export.oracle.peft_folders import oracle_folders
from adaptrix_export.passes.context import PassContext
from adaptrix_export.passes.redistribute.layers import choose_layers
from adaptrix_export.passes.redistribute.moved import Place, Terms, common_dtype
from adaptrix_export.passes.redistribute.written import (
    open_written,
    with_one_term_a_site,
    write_redistributed,
)
from adaptrix_export.plan import Adapter, Delta, LowRank, Plan, Site, low_ranks
from adaptrix_export.recipe.layers import SEARCH, Layers, check_layers
from adaptrix_export.save.peft_folder import write_peft

if TYPE_CHECKING:
    from adaptrix_export.passes.redistribute.moved import Moved
    from adaptrix_export.passes.redistribute.strategy_input import StrategyInput

MEASURED = "fidelity"  # in Plan.measured
# Times the adapter's largest rank: what a site of a target layer may have in the place of a third
# to a tenth of all layers.
RANK_FACTOR = 4
_SEARCHED = 5  # layers for whose training there is text before `search` has counted them
TASKS_MOVED = (GENERATION, FEATURES, *CLASSIFIERS)
WORDS = ("select", "fold", "fit", "distill")


@dataclass(frozen=True)
class Redistribute:
    """Moves every delta of the stack onto `layers` (see `layers.py`) by a strategy.

    `rank` bounds what is computed for a site (None: four times the adapter's largest);
    `min_retained` is the least share that must be kept; `steps` are those of `distill` (None: 100
    and 20 for each layer); `max_sites` and `max_bytes` are the budget of `layers: search`.
    `max_memory` is the bytes that the model's weights may take (None: most of what is free); a
    larger model is read layer by layer.

    Raises UnsupportedError for what cannot be moved, RecipeError for layers that the base lacks,
    FidelityError for too little retained.
    """

    layers: Layers
    strategy: str = "fit"
    rank: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    min_retained: float | None = None
    steps: int | None = None
    max_sites: int | None = None
    max_bytes: int | None = None
    max_memory: int | None = field(default=None, repr=False)  # how it runs, not what it does
    context: PassContext | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.strategy not in WORDS:
            raise RecipeError("strategy", repr(self.strategy), f"one of {', '.join(WORDS)}")
        if self.rank is not None and self.rank < 1:
            raise RecipeError("rank", str(self.rank), "at least 1")
        budget = self.max_sites is not None or self.max_bytes is not None
        if (self.layers == SEARCH) != budget:
            raise RecipeError(
                "layers", f"{self.layers} {'with' if budget else 'without'} a budget",
                "search with max_sites or max_bytes, or neither",
            )  # fmt: skip

    def __call__(self, plan: Plan) -> Plan:
        moved, measured = [], {}
        for adapter in plan.adapters:
            own = tuple(a for a in plan.adjustments if a.adapter == adapter.name)
            alone = replace(plan, adapters=(adapter,), adjustments=own)
            opened, measured[adapter.name] = self._move(alone, adapter)
            moved.append(opened)
        return plan.after(
            self,
            adapters=tuple(moved),
            adjustments=(),
            composition=None,  # the oracle is the redistributed adapter
            measured={**plan.measured, MEASURED: measured},
            redistributed=True,
        )

    def _move(self, plan: Plan, adapter: Adapter) -> tuple[Adapter, dict[str, Any]]:
        """One adapter redistributed, opened from its new folder, and what was measured."""
        from adaptrix_export.oracle.layered import Live  # PyTorch

        assert self.context is not None  # the pipeline's, or a test's
        stack, terms, outside = split_terms(plan, adapter)
        rank = self._rank(plan, terms)
        with _as_folders(plan) as folders, self.context.progress.stage("calibration: loading"):
            live = Live.open(plan.base, folders, stack, self.max_memory)
        try:
            return self._run_strategy(plan, adapter, stack, terms, outside, rank, live)
        finally:
            live.detach_all()

    def _run_strategy(
        self, plan: Plan, adapter: Adapter, stack: str, terms: Terms,
        outside: tuple[Delta, ...], rank: int, live: Any,
    ) -> tuple[Adapter, dict[str, Any]]:  # fmt: skip
        from adaptrix_export.measure.fidelity import measure

        context = self.context
        assert context is not None
        problem = self._strategy_input(plan, adapter, stack, terms, rank, live)
        moved = self._apply_strategy(problem, adapter)
        _attach(live, problem, moved.terms)
        context.hold_out(problem.rows.held_out)
        figures = measure(live, problem.rows.held_out, plan.base.task, context.progress)
        folder = context.folder_for(adapter.name)
        write_redistributed(
            plan.base, adapter, stack, moved.terms, outside, folder, repr(self), figures["retained"]
        )
        opened = open_written(folder, plan.base, adapter)
        section = self._section(problem, moved, outside, figures)
        section |= {"bytes_before": _nbytes(adapter), "bytes_after": _nbytes(opened)}
        if self.min_retained is not None and figures["retained"] < self.min_retained:
            failure = FidelityError(
                f"{adapter.name} on layers {', '.join(map(str, problem.targets))}",
                f"{figures['retained']:.3f} retained", f"at least {self.min_retained:g}",
                "nothing was published; name more layers, another strategy or nearer text",
            )  # fmt: skip
            failure.report = {MEASURED: {adapter.name: section}}
            raise failure
        return opened, section

    def _strategy_input(
        self, plan: Plan, adapter: Adapter, stack: str, terms: Terms, rank: int, live: Any
    ) -> StrategyInput:
        """The text, the target layers, and the rest of what a strategy needs."""
        from adaptrix_export.passes.redistribute.search import search
        from adaptrix_export.passes.redistribute.strategy_input import (
            STEP_TOKENS,
            StrategyInput,
            distill_steps,
        )

        context = self.context
        assert context is not None
        targets: tuple[int, ...] = ()
        if self.layers != SEARCH:  # refused before anything is computed
            targets = choose_layers(self.layers, len(live.layers))
        steps = self.steps or distill_steps(len(targets) or _SEARCHED)
        calibration = self.calibration
        if live.reader is not None:
            context.progress.note("memory does not hold the model: its layers are read one by one")
            if calibration.text == AUTO:  # a token of its own would take a reading of all layers
                calibration = replace(calibration, text=PYDOC)
        with context.progress.stage("calibration: text"):
            rows = calibration_rows(
                calibration, plan.base, live.vocabulary, live.positions, live.generate,
                more_tokens=steps * STEP_TOKENS if self.strategy == "distill" else 0,
            )  # fmt: skip
        problem = StrategyInput(
            base=plan.base, stack=stack, terms=terms, targets=targets, rank=rank,
            dtype=common_dtype(terms), steps=steps, seed=self.calibration.seed, live=live,
            rows=rows, scratch=context.folder_for(f"states of {adapter.name}"),
            progress=context.progress,
        )  # fmt: skip
        if self.layers == SEARCH:
            return replace(problem, targets=search(problem, self.max_sites, self.max_bytes))
        return problem

    def _apply_strategy(self, problem: StrategyInput, adapter: Adapter) -> Moved:
        """The strategy's terms; the adapter's own where only target layers have any."""
        from adaptrix_export.passes.redistribute.moved import Moved
        from adaptrix_export.passes.redistribute.strategies import STRATEGIES

        if {layer for layer, _ in problem.terms} <= set(problem.targets):
            note = "the adapter touches the target layers only: it is left as it is"
            return Moved(problem.terms, {}, (note,))
        moved = STRATEGIES[self.strategy](problem)
        if not moved.terms:
            raise UnsupportedError(
                f"{adapter.name}: layers {', '.join(map(str, problem.targets))}", "no delta there",
                "a target layer that the adapter changes", "use the strategy fit",
            )  # fmt: skip
        return moved

    def _section(
        self,
        problem: StrategyInput,
        moved: Moved,
        outside: tuple[Delta, ...],
        figures: dict[str, Any],
    ) -> dict[str, Any]:
        """The report's section, but for the bytes."""
        return {
            "strategy": self.strategy,
            "layers": list(problem.targets),
            "of_layers": len(problem.live.layers),
            "rank": problem.rank,
            "calibration": {
                "text": problem.rows.source, "tokens": problem.rows.tokens,
                "length": int(problem.rows.fit.shape[1]), "seed": self.calibration.seed,
            },
            **figures,
            **moved.measured,
            "sites_before": len(problem.terms) + len({delta.site for delta in outside}),
            "sites_after": len(moved.terms) + len({delta.site for delta in outside}),
            "notes": [*problem.rows.notes, *moved.notes],
        }  # fmt: skip

    def _rank(self, plan: Plan, terms: Terms) -> int:
        sizes = [min(t.a.shape[1], t.b.shape[0]) for ts in terms.values() for t in ts]
        largest = max(sum(t.rank for t in site_terms) for site_terms in terms.values())
        if self.rank is None:
            return min(RANK_FACTOR * largest, min(sizes))
        if self.rank > plan.base.architecture.hidden_size:
            raise RecipeError(
                "rank", str(self.rank), f"at most {plan.base.architecture.hidden_size}",
                "no matrix of the base has a higher rank at the residual",
            )  # fmt: skip
        return self.rank


def split_terms(plan: Plan, adapter: Adapter) -> tuple[str, Terms, tuple[Delta, ...]]:
    """(the stack, its low-rank terms by place, the deltas outside of it, which stay as they are).

    Raises UnsupportedError for anything in a layer that is not plain LoRA on a weight.
    """
    if plan.base.task not in TASKS_MOVED:
        raise UnsupportedError(
            f"{adapter.name}: task {plan.base.task}", "two stacks", ", ".join(TASKS_MOVED),
            "build without redistribution",
        )  # fmt: skip
    stack = plan.base.architecture.stacks[0].prefix if plan.base.architecture.stacks else ""
    for saved in adapter.replacements:
        if saved.site.layer is not None:
            raise _immovable(adapter, saved.site, f"a {saved.parameter} shipped whole")
    terms: dict[Place, tuple[LowRank, ...]] = {}
    outside: list[Delta] = []
    for delta in adapter.deltas:
        low = tuple(low_ranks(delta.terms))
        if len(low) != len(delta.terms) or delta.parameter != "weight":
            other = next((t for t in delta.terms if not t.is_plain), delta.terms[0])
            raise _immovable(adapter, delta.site, f"a {type(other).__name__} term")
        if delta.site.layer is None:
            outside.append(delta)
        elif delta.site.stack == stack:
            terms[delta.site.layer, delta.site.module] = low
        else:
            raise _immovable(adapter, delta.site, "a second stack of layers")
    if not terms:
        raise UnsupportedError(
            adapter.name, "no delta in a layer", "LoRA on modules of layers",
            "there is nothing to redistribute",
        )  # fmt: skip
    return stack, terms, tuple(outside)


def _immovable(adapter: Adapter, site: Site, content: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.name}: {site.path}", content, "plain LoRA on modules of layers",
        "it cannot be moved to another layer; build without redistribution",
    )  # fmt: skip


@contextmanager
def _as_folders(plan: Plan) -> Iterator[tuple[tuple[str, Path], ...]]:
    """PEFT folders that are the plan's adapters, for the live model to load.

    As they are on disk where no pass has changed them; else written anew, with ranks and scales
    that say what the passes made of them.
    """
    if not plan.history:
        with oracle_folders(plan) as folders:
            yield folders.adapters
        return
    with scratch_folder("composed") as scratch:
        written: list[tuple[str, Path]] = []
        for number, adapter in enumerate(plan.adapters):
            folder = scratch / f"{number}"
            folder.mkdir()
            write_peft(with_one_term_a_site(adapter, plan.base), plan.base, folder)
            written.append((adapter.name, folder))
        yield tuple(written)


def _attach(live: Any, problem: StrategyInput, terms: Terms) -> None:
    """The student as it will be published: its factors rounded as the file rounds them."""
    from adaptrix_export.oracle.layered import factors_of
    from adaptrix_export.passes.redistribute.moved import factors

    live.detach_all()
    pairs = {problem.path(*place): factors(site_terms) for place, site_terms in terms.items()}
    for path, pair in factors_of(pairs, live.device).items():
        live.attach(path, pair)


def _nbytes(adapter: Adapter) -> int:
    """Bytes of the adapter's tensors."""
    tensors = [t for d in adapter.deltas for term in d.terms for t in term.tensors]
    tensors += [r.tensor for r in adapter.replacements]
    return sum(prod(t.shape) * itemsize(t.dtype) for t in tensors)
