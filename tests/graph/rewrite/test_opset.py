"""The oldest opset of a graph: what is lowered, what stays, and that the bits stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.graph.rewrite.opset import lower_opset

ROWS = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
SCALE = np.random.default_rng(1).normal(size=64).astype(np.float32)


def model_of(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def normed(op: str, opset: int, **attributes: float) -> ir.Model:
    """x normed by `op` after a Reshape that copies its shape."""
    said = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    return model_of(
        f"""<ir_version: 11, opset_import: ["" : {opset}]>
        g (float[a,b,64] x, float[64] s) => (float[a,b,64] y) {{
            shape = Shape(x)
            same = Reshape(x, shape)
            y = {op}<{said}>(same, s)
        }}"""
    )


def played(model: ir.Model, tmp_path, **options) -> tuple[np.ndarray, Counter[str]]:
    """What the graph answers, and the operators that ONNX Runtime made of it."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.optimized_model_filepath = str(tmp_path / "seen.onnx")
    for name, value in options.items():
        setattr(settings, name, value)
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    seen = Counter(node.op_type for node in ir.load(tmp_path / "seen.onnx").graph)
    return session.run(None, {"x": ROWS, "s": SCALE})[0], seen


@pytest.mark.parametrize(
    ("op", "opset"), [("RMSNormalization", 24), ("SimplifiedLayerNormalization", 20)]
)
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_a_norm_is_spelled_out_and_fused_back_into_the_same_bits(tmp_path, op, opset, epsilon):
    model = normed(op, opset, axis=-1, epsilon=epsilon)
    expected, _ = played(model, tmp_path)
    assert lower_opset(model) == 1
    assert dict(model.opset_imports) == {"": 18}
    assert model.ir_version == 8
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    found, seen = played(model, tmp_path)
    assert np.array_equal(found, expected)
    assert seen["SimplifiedLayerNormalization"] == 1 and seen["Pow"] == 0
    plain, seen = played(
        model, tmp_path, graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    assert seen["Pow"] == 1  # not fused: the formula itself
    assert np.abs(plain - expected).max() <= 2e-6
    exact = ROWS.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + epsilon) * SCALE
    assert np.abs(found - exact).max() <= 2e-6


def test_a_norm_over_two_axes_is_not_one_that_can_be_spelled_out():
    model = normed("RMSNormalization", 24, axis=1)
    assert lower_opset(model) == 0
    assert dict(model.opset_imports) == {"": 23}
    assert model.ir_version == 11


@pytest.mark.parametrize(
    ("line", "opset"),
    [
        ("y = Cast<to = 1>(x)", 18),
        ("y = Cast<to = 1, saturate = 1>(x)", 18),  # the default, which 18 has no word for
        ("y = Cast<to = 1, saturate = 0>(x)", 19),
        ('y = Cast<to = 1, round_mode = "down">(x)', 24),
        ("y = HardSigmoid<alpha = 0.5>(x)", 18),
        ("y = Gelu(x)", 20),
        ("y = Swish(x)", 24),
        ("y = GroupNormalization<num_groups = 2>(x, s, s)", 21),  # means another thing in 18
    ],
)
def test_a_graph_keeps_the_opset_that_one_of_its_nodes_needs(line, opset):
    model = model_of(
        f"""<ir_version: 12, opset_import: ["" : 24]>
        g (float[a,b,64] x, float[64] s) => (float[a,b,64] y) {{ {line} }}"""
    )
    assert lower_opset(model) == 0
    assert dict(model.opset_imports) == {"": opset}
    node = model.graph[0]
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    assert set(node.attributes) <= set(schema.attributes)


def test_four_bits_need_the_opset_that_has_them():
    model = model_of(
        """<ir_version: 12, opset_import: ["" : 24]>
        g (uint4[a,64] x) => (uint4[64,a] y) { y = Transpose<perm = [1, 0]>(x) }"""
    )
    lower_opset(model)
    assert dict(model.opset_imports) == {"": 24}


def test_a_stand_in_for_an_operator_of_the_runtime_is_dropped_and_others_follow_the_graph():
    model = model_of(
        """<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1, "ai.own" : 1]>
        g (float[a,b,64] x, float[64] s) => (float[a,b,64] y) {
            z = com.microsoft.SkipSimplifiedLayerNormalization(x, x, s)
            y = ai.own.Normed(z, s)
        }
        <domain: "com.microsoft", opset_import: ["" : 24]>
        SkipSimplifiedLayerNormalization (x, skip, s) => (y) {
            sum = Add(x, skip)
            y = RMSNormalization(sum, s)
        }
        <domain: "ai.own", opset_import: ["" : 24]>
        Normed (x, s) => (y) { y = RMSNormalization<axis = -1>(x, s) }
        <domain: "ai.own", opset_import: ["" : 24]>
        Uncalled (x) => (y) { y = Swish(x) }"""
    )
    assert lower_opset(model) == 1
    assert [f.name for f in model.functions.values()] == ["Normed"]
    assert dict(model.opset_imports) == {"": 18, "com.microsoft": 1, "ai.own": 1}
    assert dict(next(iter(model.functions.values())).opset_imports) == {"": 18}
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
