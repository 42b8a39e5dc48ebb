"""GPTQ: codes chosen column by column, each column's error made good by those after it.

https://arxiv.org/abs/2210.17323. For a layer y = W x and inputs x with second moments H = X^T X,
what counts is (W - Q) H (W - Q)^T. Beyond the paper: the scale of a block is searched when the
block is reached, each column's squared error weighted by what GPTQ makes of it (1 / U_jj^2, U the
Cholesky factor of the inverse); then, for as many rounds as asked for, all scales of a row are
solved for by least squares under H, and every code is set to the best one given all others. Neither
of the two can make the error larger, but for the rounding of scales.

Everything is float32, the factorisation float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptrix_export.precision.blocks import Blocks, Spec, candidates, fp16_scales, in_blocks

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
RIDGE = 1e-6  # of a scale's own weight, for blocks whose inputs are nearly dependent


@dataclass(frozen=True)
class Problem:
    """`weight` (n, k), `hessian` (k, k) float32, and how the result is to be stored."""

    weight: Tensor
    hessian: Tensor
    spec: Spec
    rounds: int = 1


def gptq(problem: Problem) -> Blocks:
    """The quantized weight. See the module."""
    hessian = _damped(problem.hessian)
    state = _State(problem.weight, problem.spec)
    _sweep(state, _factor(hessian))
    for _ in range(problem.rounds):
        _solve_scales(state, hessian)
        _settle(state, hessian)
    return state.blocks()


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """(W - Q) H (W - Q)^T, summed over the rows."""
    error = weight - quantized
    return float(((error @ hessian) * error).sum())


def _damped(hessian: Tensor) -> Tensor:
    diagonal = hessian.diagonal()
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)
    return damped


def _factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1: row j is what an error in column j asks of those after it."""
    exact = hessian.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(exact))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


class _State:
    """Codes, scales and zero points while they are chosen, as floats, beside the weight."""

    def __init__(self, weight: Tensor, spec: Spec) -> None:
        self.weight, self.spec = weight, spec
        rows, columns = weight.shape
        self.codes = torch.zeros(rows, columns)
        self.scales = torch.zeros(rows, spec.blocks(columns))
        self.zeros = torch.full((rows, spec.blocks(columns)), float(spec.middle))

    def span(self, block: int) -> slice:
        start = block * self.spec.block
        return slice(start, min(start + self.spec.block, self.codes.shape[1]))

    def values(self) -> Tensor:
        count, block = self.codes.shape[1], self.spec.block
        zeros = self.zeros.repeat_interleave(block, dim=1)[:, :count]
        scales = self.scales.repeat_interleave(block, dim=1)[:, :count]
        return (self.codes - zeros) * scales

    def blocks(self) -> Blocks:
        zeros = None if self.spec.symmetric else self.zeros.numpy().astype(np.uint8)
        return Blocks(
            self.spec,
            self.codes.numpy().astype(np.uint8),
            self.scales.numpy().astype(np.float16),
            zeros,
        )


def _sweep(state: _State, factor: Tensor) -> None:
    """Choose scales and codes block by block; errors go to the columns after."""
    left = state.weight.clone()
    for block in range(state.scales.shape[1]):
        span = state.span(block)
        own, upper = left[:, span], factor[span, span]
        _search(state, block, own, upper.diagonal())
        scale, zero = state.scales[:, block], state.zeros[:, block]
        errors = torch.empty_like(own)
        for column in range(own.shape[1]):
            current = own[:, column]
            codes = (current / scale).round_().add_(zero).clamp_(0, state.spec.top)
            state.codes[:, span.start + column] = codes
            error = (current - (codes - zero) * scale) / upper[column, column]
            errors[:, column] = error
            if column + 1 < own.shape[1]:
                own[:, column + 1 :].addr_(error, upper[column, column + 1 :], alpha=-1)
        if span.stop < left.shape[1]:
            left[:, span.stop :].addmm_(errors, factor[span, span.stop :], alpha=-1)


def _search(state: _State, block: int, own: Tensor, diagonal: Tensor) -> None:
    """The scale and zero point of a block with the least weighted error of plain rounding."""
    weight = diagonal.pow(-2)
    values = in_blocks(own.numpy(), own.shape[1])
    least: Tensor | None = None
    for scales, zeros in candidates(values, state.spec):
        scale = torch.from_numpy(scales.astype(np.float32))
        zero = torch.from_numpy(zeros.astype(np.float32))
        codes = (own / scale).round_().add_(zero).clamp_(0, state.spec.top)
        error = codes.sub_(zero).mul_(scale).sub_(own).square_() @ weight
        if least is None:
            least = error
            state.scales[:, block], state.zeros[:, block] = scale[:, 0], zero[:, 0]
            continue
        better = error < least
        least = torch.where(better, error, least)
        state.scales[:, block] = torch.where(better, scale[:, 0], state.scales[:, block])
        state.zeros[:, block] = torch.where(better, zero[:, 0], state.zeros[:, block])


def _solve_scales(state: _State, hessian: Tensor) -> None:
    """All scales of a row at once, by least squares under the Hessian, codes as they are."""
    rows, count = state.scales.shape
    columns, block = state.codes.shape[1], state.spec.block
    centred = state.codes - state.zeros.repeat_interleave(block, dim=1)[:, :columns]
    normal = torch.empty(rows, count, count)
    for number in range(count):
        span = state.span(number)
        products = (centred[:, span] @ hessian[span]) * centred
        normal[:, number] = _block_sums(products, block, count)
    target = _block_sums((state.weight @ hessian) * centred, block, count)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    room = RIDGE * diagonal + 1e-12
    # a block of zeros has no say: its scale stays
    target = target + room * state.scales
    diagonal.add_(room)
    solved = torch.linalg.solve(normal.double(), target.double()).float()
    usable = torch.isfinite(solved) & (solved.abs() > 0.25 * state.scales.abs())
    usable &= solved.abs() < 4 * state.scales.abs()
    scales = torch.where(usable, solved, state.scales)
    state.scales = torch.from_numpy(fp16_scales(scales.numpy()).astype(np.float32))


def _block_sums(values: Tensor, block: int, count: int) -> Tensor:
    missing = count * block - values.shape[1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(len(values), count, block).sum(dim=-1)


def _settle(state: _State, hessian: Tensor) -> None:
    """Each code in turn to the best one given all others."""
    diagonal = hessian.diagonal()
    pull = (state.weight - state.values()) @ hessian  # what each column still wants
    for block in range(state.scales.shape[1]):
        span = state.span(block)
        scale = state.scales[:, block]
        own, inner = pull[:, span], hessian[span, span]
        moved = torch.zeros_like(own)
        for column in range(own.shape[1]):
            at = span.start + column
            codes = state.codes[:, at]
            step = own[:, column] / (diagonal[at] * scale)
            new = (codes + step).round_().clamp_(0, state.spec.top)
            change = (new - codes) * scale
            state.codes[:, at] = new
            moved[:, column] = change
            own.addr_(change, inner[column], alpha=-1)
        if state.scales.shape[1] > 1:
            before, after = hessian[span, : span.start], hessian[span, span.stop :]
            pull[:, : span.start].addmm_(moved, before, alpha=-1)
            pull[:, span.stop :].addmm_(moved, after, alpha=-1)
