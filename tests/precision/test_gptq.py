"""GPTQ: that each step lowers what it says it lowers, and the paper's recursion in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adaptrix_export.precision.blocks import Spec, nearest
from adaptrix_export.precision.gptq import DAMPING, Curvature, Problem, aligned, gptq, loss


def problem(rows: int = 48, columns: int = 96, spec: Spec | None = None, **more: Any) -> Problem:
    """Inputs as a model has them: some columns large, many of them dependent."""
    torch.manual_seed(0)
    mix = torch.randn(columns, columns) * torch.logspace(0, -1.5, columns)[:, None]
    inputs = torch.randn(512, columns) @ mix + torch.randn(512, columns) * 0.1
    moments = inputs.T @ inputs
    return Problem(torch.randn(rows, columns), Curvature.of(moments), spec or Spec(), **more)


def loss_of(one: Problem, blocks: Any) -> float:
    return loss(one.weight, torch.from_numpy(blocks.dequantized()), one.curvature.hessian)


@pytest.mark.parametrize("spec", [Spec(), Spec(4, 32, False), Spec(4, 64), Spec(8, 32)])
def test_it_is_far_better_than_rounding_and_each_round_helps(spec: Spec) -> None:
    plain = loss_of(problem(spec=spec), nearest(problem().weight.numpy(), spec))
    found = [loss_of(problem(spec=spec, rounds=n), gptq(problem(spec=spec, rounds=n)))
             for n in (0, 1, 3)]  # fmt: skip
    assert found[0] < 0.5 * plain
    assert found[1] < found[0] and found[2] < 1.001 * found[1]


def test_columns_that_no_block_divides() -> None:
    one = problem(columns=80, spec=Spec(4, 32, False))
    assert loss_of(one, gptq(one)) < 0.6 * loss_of(one, nearest(one.weight.numpy(), one.spec))


def test_without_rounds_it_is_the_papers_recursion() -> None:
    """Replayed in float64 from the scales that it chose: the same codes, up to ties."""
    one = problem(rounds=0)
    made = gptq(one)
    hessian = one.curvature.hessian.double().numpy()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, off = one.weight.double().numpy().copy(), 0
    for j in range(left.shape[1]):
        scale = made.scales[:, j // 32].astype(np.float64)
        codes = np.clip(np.rint(left[:, j] / scale) + 8, 0, 15)
        off += int((codes != made.codes[:, j]).sum())
        error = (left[:, j] - (made.codes[:, j].astype(np.float64) - 8) * scale) / upper[j, j]
        left[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    assert off <= 0.002 * left.size


def test_after_the_rounds_no_single_code_can_be_bettered() -> None:
    one = problem(rows=8, rounds=8)
    made = gptq(one)
    hessian = one.curvature.hessian.double()
    best = loss(one.weight.double(), torch.from_numpy(made.dequantized()).double(), hessian)
    for row in range(8):
        for column in range(0, 96, 7):
            for step in (-1, 1):
                codes = made.codes.copy()
                if 0 <= int(codes[row, column]) + step <= 15:
                    codes[row, column] = int(codes[row, column]) + step
                    other = type(made)(made.spec, codes, made.scales).dequantized()
                    found = loss(one.weight.double(), torch.from_numpy(other).double(), hessian)
                    assert found > best * (1 - 1e-9)


def test_inputs_that_are_always_zero_do_not_matter() -> None:
    one = problem()
    moments = one.curvature.hessian.clone()
    moments[5], moments[:, 5] = 0, 0
    made = gptq(Problem(one.weight, Curvature.of(moments), one.spec)).dequantized()
    assert np.isfinite(made).all()
    empty = gptq(
        Problem(one.weight, Curvature.of(torch.zeros_like(moments)), one.spec)
    ).dequantized()
    assert np.abs(empty - one.weight.numpy()).max() < 1


def test_the_curvature_is_damped_by_a_share_of_its_mean() -> None:
    moments = torch.diag(torch.tensor([1.0, 3.0, 8.0]))
    added = Curvature.of(moments).hessian - moments
    assert torch.allclose(added, torch.eye(3) * DAMPING * 4)
    factor = Curvature.of(moments).factor
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(moments + added))


@pytest.mark.parametrize("spec", [Spec(), Spec(4, 32, False)])
def test_towards_the_float_models_outputs_makes_good_what_inputs_lost(spec: Spec) -> None:
    """Of inputs that were disturbed, the error of the outputs falls beside plain GPTQ, and on
    inputs that nothing was fitted to as well."""
    one = problem(spec=spec)
    mix = torch.randn(96, 96) * torch.logspace(0, -1.5, 96)[:, None]
    exact = torch.randn(4096, 96) @ mix + torch.randn(4096, 96) * 0.1
    lost = exact @ (torch.eye(96) + 0.02 * torch.randn(96, 96))  # a linear loss can be made good
    fit, held = slice(0, 2048), slice(2048, None)
    curvature = Curvature.of(lost[fit].T @ lost[fit])
    cross = (exact[fit] - lost[fit]).T @ lost[fit]
    errors = {}
    for name, target in (
        ("plain", one.weight), ("aligned", aligned(one.weight, cross, curvature)),
    ):  # fmt: skip
        made = torch.from_numpy(gptq(Problem(target, curvature, spec)).dequantized())
        errors[name] = float((exact[held] @ one.weight.T - lost[held] @ made.T).square().sum())
    assert errors["aligned"] < 0.5 * errors["plain"]


def test_without_a_loss_of_inputs_the_target_is_the_weight() -> None:
    one = problem()
    assert torch.equal(aligned(one.weight, torch.zeros(96, 96), one.curvature), one.weight)
