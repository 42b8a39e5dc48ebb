"""The bound of a clamp, tested on the exported function itself, in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptrix_export.graph.rewrite.gate_functions import DOMAIN, FLOOR, OFFSET, call, define
from adaptrix_export.oracle.gated import openness
from adaptrix_export.oracle.job import GateSpec
from adaptrix_export.plan import clamp_slope

WIDTH, ROWS = 12, 50
TAUS = (1e-5, 0.01, 0.25, 0.9, 3.0)
SLACK = 1 + 1e-5


def _model(mode: str, tau: float | None) -> ir.Model:
    def value(name: str, width: int, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["rows", width]), type=ir.TensorType(kind))

    inputs = [value("y0", WIDTH), value("d", WIDTH), value("third", 1)]
    node = call(mode, inputs, "site", tau, WIDTH)
    for output, width in zip(node.outputs, (WIDTH, 1), strict=True):
        output.shape, output.type = ir.Shape(["rows", width]), inputs[0].type
    graph = ir.Graph(
        inputs, list(node.outputs), nodes=[node], opset_imports={"": 24, DOMAIN: 1}, name="gate"
    )
    model = ir.Model(graph, ir_version=10)
    define(model, {mode})
    return model


@cache
def _session(mode: str, tau: float | None) -> Any:
    proto = ir.serde.serialize_model(_model(mode, tau))
    onnx.checker.check_model(proto)
    return ort.InferenceSession(proto.SerializeToString())


def gated(
    y0: Any, d: Any, tau: float | None, mask: Any = None, mode: str = "clamp"
) -> tuple[np.ndarray, np.ndarray]:
    third = np.ones((len(y0), 1), np.float32) if mask is None else np.asarray(mask, np.float32)
    if mode == "clamp":
        third = np.where(third == 1, np.float32(FLOOR), np.float32(np.inf))
    fed = {"y0": np.asarray(y0, np.float32), "d": np.asarray(d, np.float32), "third": third}
    y, gate = _session(mode, tau).run(None, fed)
    return y, gate


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """ROWS pairs (y0, d) from denormals to 1e18, |d| up to 1e6 |y0|, some values or rows zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = st.integers(-45, 18)
    ratio = st.floats(-8, 6)
    rows = draw(st.lists(st.tuples(size, ratio), min_size=ROWS, max_size=ROWS))
    sizes = 10.0 ** np.array([[size] for size, _ in rows], float)
    ratios = 10.0 ** np.array([[ratio] for _, ratio in rows])
    y0, direction = rng.standard_normal((2, ROWS, WIDTH))
    zeros = draw(st.sampled_from(["none", "some", "rows", "d", "y0"]))
    if zeros == "some":
        y0[rng.random(y0.shape) < 0.5] = 0
        direction[rng.random(y0.shape) < 0.5] = 0
    elif zeros == "rows":
        y0[::3], direction[::2] = 0, 0
    elif zeros in ("d", "y0"):
        (direction if zeros == "d" else y0)[:] = 0
    if draw(st.booleans()):  # the worst case of rounding: all along y0
        direction = np.copysign(y0, rng.standard_normal((ROWS, 1)))
    return np.float32(sizes * y0), np.float32(sizes * ratios * direction)


@given(tau=st.sampled_from(TAUS), pair=pairs())
@settings(max_examples=10_000 // ROWS)
def test_no_output_is_further_from_the_base_than_tau(
    tau: float, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    y0, d = pair
    y, gate = gated(y0, d, tau)
    base, moved = y0.astype(np.float64), y.astype(np.float64) - y0.astype(np.float64)
    size = np.linalg.norm(base, axis=1)
    assert np.isfinite(y).all() and ((gate >= 0) & (gate <= 1)).all()
    assert (np.linalg.norm(moved, axis=1) <= tau * size * SLACK).all()
    if tau < 1:
        rows = size > 0
        along = ((base + moved) * base).sum(1)[rows]
        cosine = along / (np.linalg.norm(base + moved, axis=1) * size)[rows]
        assert (cosine >= np.sqrt(1 - (tau * SLACK) ** 2) - 1e-12).all()


@given(tau=st.sampled_from(TAUS), pair=pairs())
@settings(max_examples=60)
def test_what_is_within_the_bound_passes_whole(
    tau: float, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    y0, d = pair
    y, gate = gated(y0, d, tau)
    sizes = [np.linalg.norm(v.astype(np.float64), axis=1) for v in (y0, d)]
    share = (clamp_slope(tau, WIDTH) - 2.0**-24) * (1 - 1e-6)
    free = np.maximum(sizes[1], FLOOR) <= share * sizes[0]
    assert (gate[free] == 1).all() and (y[free] == (y0 + d)[free]).all()
    clamped = (sizes[1] > tau * sizes[0] * SLACK) & (sizes[1] > FLOOR) & (sizes[1] < 1e18)
    wanted = tau * sizes[0][clamped] / sizes[1][clamped]
    hair = 0.03 if tau < 1e-3 else 1e-4
    np.testing.assert_allclose(gate[clamped, 0], wanted, rtol=hair, atol=1.01 * OFFSET * tau)


@given(tau=st.sampled_from(TAUS), pair=pairs())
@settings(max_examples=60)
def test_the_oracle_opens_as_far(tau: float, pair: tuple[np.ndarray, np.ndarray]) -> None:
    """The formula in fp64, written without knowledge of the function, gives the same gates, but
    for the hair by which the function stays below the bound."""
    y0, d = pair
    _, gate = gated(y0, d, tau)
    gate_spec = GateSpec("site", "clamp", tau=float(np.float32(tau)))
    wanted = openness(gate_spec, *(torch.from_numpy(v).double() for v in (y0, d))).numpy()
    size = np.linalg.norm(d.astype(np.float64), axis=1, keepdims=True)
    plain = (size > FLOOR) | (size == 0)  # the floor and the norm overflow for others
    plain &= (size < 1e18) & ((size > 0) | (clamp_slope(tau, WIDTH) * _size(y0) > 2 * FLOOR))
    np.testing.assert_allclose(gate[plain], wanted[plain], rtol=1e-5, atol=1.01 * OFFSET * tau)


def _size(values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)


def test_the_bound_is_met_not_only_kept() -> None:
    """A gate that is always shut keeps any bound: a large d moves y by tau |y0|."""
    y0, d = np.eye(WIDTH), 100 * np.roll(np.eye(WIDTH), 1, axis=1)
    y, _ = gated(y0, d, 0.25)
    np.testing.assert_allclose(np.linalg.norm(y - y0, axis=1), 0.25, rtol=1e-5)


def test_the_check_would_notice_a_larger_tau() -> None:
    y0, d = np.eye(WIDTH), 100 * np.roll(np.eye(WIDTH), 1, axis=1)
    moved = np.linalg.norm(gated(y0, d, 0.25 * 1.0001)[0] - y0, axis=1)
    assert (moved > 0.25 * SLACK).all()


@pytest.mark.parametrize("mode", ["clamp", "mask"])
def test_padding_is_untouched(mode: str) -> None:
    y0, d = np.float32(np.random.default_rng(0).standard_normal((2, 4, WIDTH)))
    mask = [[1], [0], [1], [0]]
    y, gate = gated(y0, d, 5.0 if mode == "clamp" else None, mask, mode)
    assert gate.ravel().tolist()[1::2] == [0, 0] and (y[1::2] == y0[1::2]).all()
    assert (y[::2] != y0[::2]).any(axis=1).all()


def test_a_function_is_one_named_node() -> None:
    model = _model("clamp", 0.25)
    nodes = [(n.domain, n.op_type, n.name) for n in model.graph]
    assert nodes == [("ai.adaptrix", "Clamp", "site")] and len(model.functions) == 1
