"""GPTQ: codes chosen column by column, each column's error made good by those after it.

https://arxiv.org/abs/2210.17323. For a layer y = W x and inputs x with second moments H = X^T X,
what counts is (W - Q) H (W - Q)^T. Beyond the paper: the scale of a block is searched when the
block is reached, each column's squared error weighted by what GPTQ makes of it (1 / U_jj^2, U the
Cholesky factor of the inverse); then, for as many rounds as asked for, all scales of a row are
solved for by least squares under H, and every code is set to the best one given all others. Neither
of the two can make the error larger, but for the rounding of scales.

Everything is float32, the factorisation float64. Matrices are (k, n) here, an input a row: what is
chosen at once, the codes of one input, then lies together in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adaptrix_export.precision.blocks import Blocks, Spec, candidates, fp16_scales

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
RIDGE = 1e-6  # of a scale's own weight, for blocks whose inputs are nearly dependent


@dataclass(frozen=True)
class Curvature:
    """Second moments of a layer's inputs (k, k), damped, their inverse, and its factor: upper U
    with U^T U = H^-1, whose row j is what an error in input j asks of those after it."""

    hessian: Tensor
    inverse: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Curvature:
        damped = moments.clone()
        damped.diagonal().add_(DAMPING * float(moments.diagonal().mean()) or 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
        factor = torch.linalg.cholesky(inverse, upper=True)
        return cls(damped, inverse.float(), factor.float())


@dataclass(frozen=True)
class Problem:
    """`weight` (n, k), the curvature of its inputs, and how the result is to be stored."""

    weight: Tensor
    curvature: Curvature
    spec: Spec
    rounds: int = 1


def gptq(problem: Problem) -> Blocks:
    """The quantized weight. See the module."""
    hessian = problem.curvature.hessian
    state = _State(problem.weight, problem.spec)
    _sweep(state, problem.curvature.factor)
    for _ in range(problem.rounds):
        _solve_scales(state, hessian)
        _settle(state, hessian)
    return state.blocks()


def aligned(weight: Tensor, cross: Tensor, curvature: Curvature) -> Tensor:
    """The weight that makes of the inputs at hand what `weight` (n, k) makes of those it had in the
    float model, by damped least squares; `cross` (k, k) is (X - X')^T X', X' being at hand.

    So that a layer also makes good what the layers before it lost. The target is that of GPTAQ,
    https://arxiv.org/abs/2504.02692.
    """
    return weight + (weight @ cross) @ curvature.inverse


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """(W - Q) H (W - Q)^T, summed over the rows."""
    error = weight - quantized
    return float(((error @ hessian) * error).sum())


class _State:
    """Codes (k, n), scales and zero points (blocks, n) while they are chosen, as floats."""

    def __init__(self, weight: Tensor, spec: Spec) -> None:
        self.weight, self.spec = weight.T.contiguous(), spec
        columns, rows = self.weight.shape
        self.codes = torch.zeros(columns, rows)
        self.scales = torch.zeros(spec.blocks(columns), rows)
        self.zeros = torch.full((spec.blocks(columns), rows), float(spec.middle))

    def spans(self) -> Iterator[tuple[int, slice]]:
        columns, size = len(self.codes), self.spec.block
        for block in range(len(self.scales)):
            yield block, slice(block * size, min((block + 1) * size, columns))

    def spread(self, by_block: Tensor) -> Tensor:
        """A number a block as a number a column."""
        return by_block.repeat_interleave(self.spec.block, dim=0)[: len(self.codes)]

    def block_sums(self, values: Tensor) -> Tensor:
        """(k, n) summed over the columns of each block: (blocks, n)."""
        missing = len(self.scales) * self.spec.block - len(values)
        if missing:
            values = functional.pad(values, (0, 0, 0, missing))
        return values.reshape(len(self.scales), self.spec.block, -1).sum(dim=1)

    def centred(self) -> Tensor:
        return self.codes - self.spread(self.zeros)

    def values(self) -> Tensor:
        return self.centred().mul_(self.spread(self.scales))

    def blocks(self) -> Blocks:
        zeros = None if self.spec.symmetric else self.zeros.T.numpy().astype(np.uint8)
        return Blocks(
            self.spec,
            self.codes.T.contiguous().numpy().astype(np.uint8),
            self.scales.T.numpy().astype(np.float16),
            zeros,
        )


def _sweep(state: _State, factor: Tensor) -> None:
    """Choose scales and codes block by block; errors go to the columns after."""
    left = state.weight.clone()
    for block, span in state.spans():
        own, upper = left[span], factor[span, span]
        _search(state, block, own, upper.diagonal())
        scale, zero = state.scales[block], state.zeros[block]
        errors = torch.empty_like(own)
        for column, current in enumerate(own):
            codes = (current / scale).round_().add_(zero).clamp_(0, state.spec.top)
            state.codes[span.start + column] = codes
            errors[column] = (current - (codes - zero) * scale) / upper[column, column]
            if column + 1 < len(own):
                own[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
        if span.stop < len(left):
            left[span.stop :].addmm_(factor[span, span.stop :].T, errors, alpha=-1)


def _search(state: _State, block: int, own: Tensor, diagonal: Tensor) -> None:
    """The scale and zero point of a block with the least weighted error of plain rounding."""
    weight = diagonal.pow(-2)[:, None]
    least: Tensor | None = None
    for scales, zeros in candidates(own.T.numpy()[:, None], state.spec):
        scale = torch.from_numpy(scales.astype(np.float32))[:, 0]
        zero = torch.from_numpy(zeros.astype(np.float32))[:, 0]
        codes = (own / scale).round_().add_(zero).clamp_(0, state.spec.top)
        error = codes.sub_(zero).mul_(scale).sub_(own).square_().mul_(weight).sum(dim=0)
        if least is None:
            least = error
            state.scales[block], state.zeros[block] = scale, zero
            continue
        better = error < least
        least = torch.where(better, error, least)
        state.scales[block] = torch.where(better, scale, state.scales[block])
        state.zeros[block] = torch.where(better, zero, state.zeros[block])


def _solve_scales(state: _State, hessian: Tensor) -> None:
    """All scales of a row at once, by least squares under the Hessian, codes as they are."""
    count, rows = state.scales.shape
    centred = state.centred()
    normal = torch.empty(count, count, rows)
    for block, span in state.spans():
        normal[block] = state.block_sums((hessian[:, span] @ centred[span]).mul_(centred))
    target = state.block_sums((hessian @ state.weight).mul_(centred))
    normal = normal.permute(2, 0, 1).contiguous()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    room = RIDGE * diagonal + 1e-12
    # a block of zeros has no say: its scale stays
    target = target.T + room * state.scales.T
    diagonal.add_(room)
    solved = torch.linalg.solve(normal.double(), target.double()).float().T
    usable = torch.isfinite(solved) & (solved.abs() > 0.25 * state.scales.abs())
    usable &= solved.abs() < 4 * state.scales.abs()
    scales = torch.where(usable, solved, state.scales)
    state.scales = torch.from_numpy(fp16_scales(scales.numpy()).astype(np.float32))


def _settle(state: _State, hessian: Tensor) -> None:
    """Each code in turn to the best one given all others."""
    diagonal = hessian.diagonal()
    pull = hessian @ (state.weight - state.values())  # what each column still wants
    for block, span in state.spans():
        scale = state.scales[block]
        own, inner = pull[span], hessian[span, span]
        moved = torch.empty_like(own)
        for column, change in enumerate(own):
            codes = state.codes[span.start + column]
            step = change / (diagonal[span.start + column] * scale)
            new = step.add_(codes).round_().clamp_(0, state.spec.top)
            moved[column] = (new - codes) * scale
            state.codes[span.start + column] = new
            own.addr_(inner[column], moved[column], alpha=-1)
        if span.start:
            pull[: span.start].addmm_(hessian[: span.start, span], moved, alpha=-1)
        if span.stop < len(pull):
            pull[span.stop :].addmm_(hessian[span.stop :, span], moved, alpha=-1)
