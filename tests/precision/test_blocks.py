"""Quantized matrices: rounding, packing, and what ONNX Runtime makes of the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from adaptrix_export.precision.blocks import Blocks, Spec, nearest, stacked
from adaptrix_export.precision.packing import packed_codes, packed_rows, packed_zeros, unpacked


def random(rows: int, columns: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


SPECS = st.builds(
    Spec, bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32, 64]), symmetric=st.booleans()
)


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 9))
def test_packing_is_undone_exactly(spec: Spec, rows: int, columns: int, seed: int) -> None:
    made = nearest(random(rows, columns, seed), spec)
    back = unpacked(spec, columns, packed_codes(made), made.scales, packed_zeros(made))
    assert back.digest() == made.digest()
    assert np.array_equal(back.dequantized(), made.dequantized())


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, columns=st.integers(1, 100), seed=st.integers(0, 9), size=st.floats(-3, 3))
def test_each_code_is_the_nearest_one(spec: Spec, columns: int, seed: int, size: float) -> None:
    """Replayed in float64 from the stored scales: no other code is nearer."""
    matrix = (random(4, columns, seed) * 10**size).astype(np.float32)
    made = nearest(matrix, spec)
    steps = np.repeat(made.scales.astype(np.float64), spec.block, axis=1)[:, :columns]
    zeros = np.full(made.scales.shape, spec.middle) if made.zeros is None else made.zeros
    shift = np.repeat(zeros.astype(np.float64), spec.block, axis=1)[:, :columns]
    exact = np.clip(matrix / steps + shift, 0, spec.top)
    assert np.abs(made.codes - exact).max() <= 0.5 + 1e-6
    assert np.array_equal(made.dequantized(), ((made.codes - shift) * steps).astype(np.float32))


def test_a_search_is_never_worse_than_the_plain_scale() -> None:
    matrix = random(64, 256)
    blocks = matrix.reshape(64, 8, 32)
    plain = np.abs(blocks).max(axis=-1, keepdims=True) / 7
    rounded = np.clip(np.rint(blocks / plain), -8, 7) * plain
    naive = float(((rounded - blocks) ** 2).sum())
    found = float(((nearest(matrix, Spec()).dequantized() - matrix) ** 2).sum())
    assert found < 0.9 * naive


def test_a_weighted_search_minds_the_columns_that_count() -> None:
    matrix, weight = random(64, 64), np.ones(64, np.float32)
    weight[::8] = 100
    plain, minded = (nearest(matrix, Spec(), w).dequantized() - matrix for w in (None, weight))
    assert (minded[:, ::8] ** 2).sum() < 0.8 * (plain[:, ::8] ** 2).sum()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15])
def test_extreme_values_give_finite_scales(value: float) -> None:
    made = nearest(np.full((2, 32), value, np.float32), Spec())
    assert np.isfinite(made.scales.astype(np.float32)).all() and made.scales.all()


def test_blocks_are_stacked_without_a_change() -> None:
    first, second = (nearest(random(3, 96, s), Spec(4, 96, False)) for s in (0, 1))
    both = stacked([first, second])
    assert np.array_equal(both.dequantized()[3:], second.dequantized())


def _run(nodes: list[Any], constants: dict[str, Any], x: Any) -> Any:
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info("x", numpy_type(x), x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def numpy_type(x: Any) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(x.dtype)


def constants_of(made: Blocks, codes: Any) -> tuple[list[str], dict[str, Any]]:
    found = {"codes": codes, "scales": made.scales.astype(np.float32)}
    zeros = packed_zeros(made)
    if zeros is not None:
        found["zeros"] = zeros
    return [*found], found


@pytest.mark.parametrize("spec", [Spec(b, n, s) for b in (4, 8) for n in (32, 128)
                                  for s in (True, False)])  # fmt: skip
@pytest.mark.parametrize("columns", [128, 64, 80])
def test_matmulnbits_computes_with_the_dequantized_values(spec: Spec, columns: int) -> None:
    made, x = nearest(random(24, columns), spec), random(5, columns, 1)
    names, constants = constants_of(made, packed_codes(made))
    node = helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", K=columns, N=24,
        bits=spec.bits, block_size=spec.block, accuracy_level=0,
    )  # fmt: skip
    found = _run([node], constants, x)
    wanted = x.astype(np.float64) @ made.dequantized().T.astype(np.float64)
    assert np.abs(found - wanted).max() < 2e-5
    wrong = made.codes.copy()
    wrong[3] = wrong[3, ::-1]
    assert (
        np.abs(x @ Blocks(spec, wrong, made.scales, made.zeros).dequantized().T - found).max() > 1
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_gather_block_quantized_reads_the_same_rows(bits: int) -> None:
    made = nearest(random(24, 128), Spec(bits, 32))
    names, constants = constants_of(made, packed_rows(made))
    node = helper.make_node(
        "GatherBlockQuantized", [names[0], "x", names[1]], ["y"], domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=32, bits=bits,
    )  # fmt: skip
    ids = np.array([[3, 0], [23, 7]], np.int64)
    assert np.array_equal(_run([node], constants, ids), made.dequantized()[ids])
