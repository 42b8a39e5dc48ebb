"""`fit`: each target layer is corrected in closed form for what the layers before it have lost.

Targets are visited in ascending order. At each, the student (base, plus what is fitted already)
starts from the adapter's own deltas there; then each module that writes to the residual gets a
low-rank term that takes the student's residual to the adapted model's, by reduced-rank ridge
regression (Izenman 1975; the ridge makes it fit for few tokens):

    C = X^T X = Q S Q^T,  S' = S + lambda mean(S),  G = S'^(-1/2) Q^T X^T R,
    V = the top-r eigenvectors of G^T G,  A = (Q S'^(-1/2) G V)^T,  B = V

with X the module's inputs and R the difference of the residuals, a row a token, each row divided
by the size of the adapted residual. Lambda is the one that serves the last fifth of the tokens
best. X and R are kept as X^T X and X^T R only, in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptrix_export.oracle.layered import ADAPTED, STUDENT, Live, States, factors_of
from adaptrix_export.oracle.writes import OUTPUT, Watch, Write, find_writes
from adaptrix_export.passes.redistribute.moved import (
    Factors,
    Moved,
    Place,
    Terms,
    as_term,
    beside,
    factors,
)
from adaptrix_export.passes.redistribute.strategies.select import select
from adaptrix_export.passes.redistribute.strategy_input import BATCH_TOKENS, StrategyInput

LAMBDAS = (0.3, 1.0, 3.0, 10.0)
CHOSEN_BY = 5  # the last one in so many tokens chooses lambda and checks the fit
SHRINK = (1.0, 0.5, 0.25)  # tried in turn where a fit makes the error larger; then it is dropped


@dataclass
class Sums:
    """X^T X, X^T R and |R|^2 of some tokens."""

    xx: Tensor
    xr: Tensor
    rr: float = 0.0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: Any) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(inputs, inputs), zeros(inputs, outputs))

    def add(self, x: Tensor, r: Tensor) -> None:
        """Rows x (tokens, in) and r (tokens, out), fp32; sums over a batch are fp32, over batches
        fp64."""
        self.xx += x.T @ x
        self.xr += x.T @ r
        self.rr += float(r.double().square().sum())

    def error(self, a: Tensor, b: Tensor) -> float:
        """|R - X a^T b^T|^2."""
        return float(
            self.rr - 2 * ((a @ self.xr) * b.T).sum() + ((a @ self.xx @ a.T) * (b.T @ b)).sum()
        )


def fit(problem: StrategyInput) -> Moved:
    """Terms for the target layers, fitted on `problem.rows.fit`."""
    live, ids = problem.live, torch.from_numpy(problem.rows.fit)
    terms = select(problem.terms, problem.targets)
    shape = (*ids.shape, live.width)
    states = {who: States(problem.scratch, f"{who}.f32", shape) for who in (ADAPTED, STUDENT)}
    for start, stop in batches(ids.shape):
        hidden = live.enter(ids[start:stop].to(live.device))
        for state in states.values():
            state.write(start, hidden)
    targets: list[dict[str, Any]] = []
    notes: list[str] = []
    with problem.progress.stage("fitting", max(problem.targets) + 1, "layers") as advance:
        for number in range(max(problem.targets) + 1):
            if number in problem.targets:
                entry, note = _fit_layer(problem, states, number, terms)
                targets.append(entry)
                notes += note
            else:
                for who, state in states.items():
                    _advance(live, who, number, state, ids.shape)
            advance(1)
    return Moved(terms, {"targets": targets}, tuple(notes))


def batches(shape: Any) -> Iterator[tuple[int, int]]:
    """(first, one past the last) row of each batch."""
    step = max(1, BATCH_TOKENS // shape[1])
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _advance(live: Live, who: str, number: int, state: States, shape: Any) -> None:
    with torch.no_grad():
        for start, stop in batches(shape):
            hidden = state.read(start, stop, live.device)
            state.write(start, live.layer(who, number, hidden))


def _fit_layer(
    problem: StrategyInput, states: dict[str, States], number: int, terms: Terms
) -> tuple[dict[str, Any], list[str]]:
    """Fit the writing modules of one layer, one after the other, and move both states past it."""
    live = problem.live
    here = {module: ts for (layer, module), ts in terms.items() if layer == number}
    start = {module: factors(site_terms) for module, site_terms in here.items()}
    for path, pair in factors_of(
        {problem.path(number, m): f for m, f in start.items()}, live.device
    ).items():
        live.attach(path, pair)
    sample = states[STUDENT].read(0, 1, live.device)
    one = _LayerFit(
        problem, states, number, find_writes(live, number, sample, _matrices(problem, number))
    )
    before = one.error()
    added = one.fit_all(start)
    after = one.error()
    notes: list[str] = []
    used = 1.0
    for share in SHRINK[1:] if after > before else ():
        used, after = share, one.scaled(added, start, share)
        if after <= before:
            break
    if after > before:
        used, after = 0.0, one.scaled(added, start, 0.0)
    if used < 1.0:
        how = f"shrunk to {used:g}" if used else "dropped"
        notes.append(f"layer {number}: the fit made the error larger on unseen tokens: {how}")
    for module, (a, b) in added.items():
        if used:
            place: Place = (number, module)
            own = [start[module]] if module in start else []
            terms[place] = (as_term(place, beside([*own, (a, used * b)]), problem.dtype),)
    one.pass_layer()
    total = one.size()
    entry = {
        "layer": number,
        "modules": [w.module for w in one.writes],
        "lambda": one.chosen,
        "error_before": _share(before, total),
        "error_after": _share(after, total),
        "used": used,
    }
    return entry, notes


def _share(error: float, size: float) -> float:
    return round((error / size) ** 0.5, 6) if size else 0.0


def _matrices(problem: StrategyInput, number: int) -> frozenset[str]:
    """The modules of a layer that hold a matrix, by the base's own tensors."""
    start, end = f"{problem.stack}.{number}.", ".weight"
    return frozenset(
        name[len(start) : -len(end)]
        for name, tensor in problem.base.tensors.items()
        if name.startswith(start) and name.endswith(end) and len(tensor.shape) == 2
    )


class _LayerFit:
    """The fit of one layer: what it sees, solves and measures."""

    def __init__(
        self, problem: StrategyInput, states: dict[str, States], number: int, writes: list[Write]
    ) -> None:
        self.problem, self.states, self.number, self.writes = problem, states, number, writes
        self.watch = Watch(problem.live, number)
        self.adapted_states: dict[str, States] = {}  # by point
        self.chosen: list[float] = []
        tokens = problem.rows.fit.size
        self.border = tokens - max(1, tokens // CHOSEN_BY)  # the first token that only chooses

    def fit_all(self, start: dict[str, Factors]) -> dict[str, Factors]:
        """The terms to add, each attached before the next is fitted."""
        added: dict[str, Factors] = {}
        for write in self.writes:
            training, validation = self.sums(write)
            a, b, penalty = solve(training, validation, self.problem.rank)
            self.chosen.append(penalty)
            added[write.module] = (a.cpu().numpy(), b.cpu().numpy())
            self._attach(write.module, added[write.module], start)
        return added

    def scaled(self, added: dict[str, Factors], start: dict[str, Factors], share: float) -> float:
        """The error with a share of what was added."""
        for module, (a, b) in added.items():
            self._attach(module, (a, share * b), start)
        return self.error()

    def _attach(self, module: str, pair: Factors, start: dict[str, Factors]) -> None:
        live = self.problem.live
        whole = beside([start[module], pair]) if module in start else pair
        path = self.problem.path(self.number, module)
        live.attach(path, factors_of({path: whole}, live.device)[path])

    def sums(self, write: Write) -> tuple[Sums, Sums]:
        """Those of the tokens to fit on, and of those to choose by."""
        both: tuple[Sums, ...] = ()
        for first, x, _, r in self._rows(write):
            if not both:
                both = tuple(Sums.empty(x.shape[1], r.shape[1], x.device) for _ in range(2))
            cut = min(max(self.border - first, 0), len(x))
            both[0].add(x[:cut], r[:cut])
            both[1].add(x[cut:], r[cut:])
        return both[0], both[1]

    def error(self) -> float:
        """|R|^2 after the layer, of the tokens that were not fitted on."""
        return sum(
            float(r[max(self.border - first, 0) :].double().square().sum())
            for first, _, _, r in self._rows(self.writes[-1 if self._in_flow() else 0])
        )

    def size(self) -> float:
        """What the error is a share of: the weighted adapted residual of the same tokens."""
        values = self.problem.rows.fit.size - self.border
        return float(values * self.problem.live.width)

    def _in_flow(self) -> bool:
        return any(write.point for write in self.writes)

    def _rows(self, write: Write) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(number of the first token, X, adapted residual, R), weighted, batch by batch."""
        live, length = self.problem.live, self.problem.rows.fit.shape[1]
        adapted = self._adapted(write)
        for start, stop in batches(self.problem.rows.fit.shape):
            student = self.states[STUDENT].read(start, stop, live.device)
            adapted_values = adapted.read(start, stop, live.device)
            inputs, student_values = self.watch.run(STUDENT, student, write)
            weight = 1 / adapted_values.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            values = (inputs, adapted_values, adapted_values - student_values)
            flat = [(v * weight).flatten(0, 1) for v in values]
            yield start * length, flat[0], flat[1], flat[2]

    def pass_layer(self) -> None:
        """Move both states past the layer, as it is now."""
        live, shape = self.problem.live, self.problem.rows.fit.shape
        _advance(live, STUDENT, self.number, self.states[STUDENT], shape)
        if OUTPUT not in self.adapted_states:
            _advance(live, ADAPTED, self.number, self.states[ADAPTED], shape)
            return
        for start, stop in batches(shape):
            self.states[ADAPTED].write(start, self.adapted_states[OUTPUT].read(start, stop, "cpu"))

    def _adapted(self, write: Write) -> States:
        """The adapted model's values at the point of a write, which no fit changes: run once."""
        if write.point not in self.adapted_states:
            rows, live = self.problem.rows.fit, self.problem.live
            shape = (rows.shape[0], rows.shape[1], live.width)
            state = States(self.problem.scratch, f"wanted-{len(self.adapted_states)}.f32", shape)
            for start, stop in batches(rows.shape):
                hidden = self.states[ADAPTED].read(start, stop, live.device)
                state.write(start, self.watch.run(ADAPTED, hidden, write)[1])
            self.adapted_states[write.point] = state
        return self.adapted_states[write.point]


def solve(training: Sums, validation: Sums, rank: int) -> tuple[Tensor, Tensor, float]:
    """(a, b, lambda): of the pairs fitted on `training`, that with the least error on
    `validation`."""
    values, basis = torch.linalg.eigh(training.xx)
    values = values.clamp_min(0)
    turned = basis.T @ training.xr
    best: tuple[float, Tensor, Tensor, float] | None = None
    for penalty in LAMBDAS:
        raised = values + penalty * values.mean() + torch.finfo(torch.float64).tiny
        half = raised.rsqrt()[:, None]
        g = half * turned
        _, vectors = torch.linalg.eigh(g.T @ g)  # ascending
        b = vectors[:, -rank:]
        a = (basis @ (half * (g @ b))).T
        error = validation.error(a, b)
        if best is None or error < best[0]:
            best = (error, a, b, penalty)
    assert best is not None
    return best[1], best[2], best[3]
