"""How slots are joined to a graph: right in each form, with the nodes that it should take."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.graph.rewrite.slot_sums import join
from adaptrix_export.graph.rewrite.slots import Member, Place, Slot, slot_branches

SIZES = ((3, 4), (4, 2))  # (inputs, outputs) of two linear layers in a row
FORMS = ("whole", "biased", "matrix", "other axes")
RANDOM = np.random.default_rng(0)
WEIGHTS = [RANDOM.normal(size=size).astype("f") for size in SIZES]
BIASES = [RANDOM.normal(size=size[1]).astype("f") for size in SIZES]


def value(name, shape, kind=ir.DataType.FLOAT):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def drawn(form):
    """Two layers of `input_ids`' shape as they are, with a bias, as matrices, or of other axes."""
    axes = {"matrix": ["rows"], "other axes": ["tokens", "batch"]}.get(form, ["batch", "tokens"])
    ids = value("input_ids", ["batch", "tokens"], ir.DataType.INT64)
    x = first = value("x", [*axes, 3])
    constants, nodes, places = [], [], []
    for number, (inputs, outputs) in enumerate(SIZES):
        w = ir.Value(name=f"w{number}", const_value=ir.tensor(WEIGHTS[number]))
        b = ir.Value(name=f"b{number}", const_value=ir.tensor(BIASES[number]))
        constants += [w, b]
        if form == "matrix":
            made = [ir.node("Gemm", [x, w, b])]
        else:
            made = [ir.node("MatMul", [x, w])]
            if form == "biased":
                made.append(ir.node("Add", [b, made[0].outputs[0]]))
        for step, node in enumerate(made):
            out = node.outputs[0]
            out.name = node.name = f"layer{number}.{step}"
            out.shape, out.type = ir.Shape([*axes, outputs]), ir.TensorType(ir.DataType.FLOAT)
        members = (Member(f"layer{number}", (0, outputs), (0, outputs)),)
        slot = Slot(f"layer{number}", inputs, outputs, members)
        places.append(Place(slot, x, made[-1].outputs[0], (0, outputs), outputs))
        nodes += made
        x = made[-1].outputs[0]
    graph = ir.Graph([first, ids], [x], nodes=nodes, initializers=constants,
                     opset_imports={"": 21})  # fmt: skip
    return ir.Model(graph, ir_version=10), places


def answers(model, given):
    data = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, given)[0]


@pytest.mark.parametrize("form", FORMS)
def test_slots_in_a_row_add_up_and_empty_ones_change_nothing(form):
    given = {"x": RANDOM.normal(size=(5, 3) if form == "matrix" else (2, 5, 3)).astype("f")}
    given["input_ids"] = np.zeros((2, 5), np.int64)
    plain, _ = drawn(form)
    base = answers(plain, given)
    model, places = drawn(form)
    assert join(model, slot_branches(model, places)) == 2
    assert np.array_equal(answers(model, given), base)
    expected = given["x"].astype(np.float64)
    for number, (inputs, outputs) in enumerate(SIZES):
        a, b = (RANDOM.normal(size=s).astype("f") for s in ((inputs, 2), (2, outputs)))
        given |= {f"layer{number}.lora_A": a, f"layer{number}.lora_B": b}
        bias = BIASES[number] if form in ("biased", "matrix") else 0
        expected = expected @ WEIGHTS[number] + bias + expected @ a @ b
    found = answers(model, given)
    assert found.shape == base.shape
    assert np.abs(found - expected).max() < 1e-5 < np.abs(base - expected).max()


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("whole", {"MatMul": 4, "Gemm": 2, "Reshape": 2, "Shape": 1, "Concat": 1}),
        ("biased", {"MatMul": 4, "Gemm": 2, "Reshape": 2, "Shape": 1, "Concat": 1, "Add": 2}),
        ("matrix", {"MatMul": 2, "Gemm": 4}),
        ("other axes", {"MatMul": 6, "Add": 2}),
    ],
)
def test_it_takes_so_many_nodes(form, wanted):
    model, places = drawn(form)
    join(model, slot_branches(model, places))
    assert Counter(node.op_type for node in model.graph) == wanted
    model, _ = drawn(form)
    assert join(model, []) == 0
    assert len(list(model.graph)) == {"biased": 4}.get(form, 2)


def test_what_reads_one_value_shares_its_matrix():
    """Two layers side by side: x is made a matrix once, and both outputs keep their names."""
    x, ids = value("x", ["b", "t", 3]), value("input_ids", ["b", "t"], ir.DataType.INT64)
    constants, nodes, places = [], [], []
    for name in ("gate", "up"):
        constants.append(ir.Value(name=f"{name}.w", const_value=ir.tensor(WEIGHTS[0])))
        node = ir.node("MatMul", [x, constants[-1]], name=name)
        out = node.outputs[0]
        out.name = f"{name}.y"
        out.shape, out.type = ir.Shape(["b", "t", 4]), ir.TensorType(ir.DataType.FLOAT)
        places.append(Place(Slot(name, 3, 4, (Member(name, (0, 4), (0, 4)),)), x, out, (0, 4), 4))
        nodes.append(node)
    graph = ir.Graph([x, ids], [node.outputs[0] for node in nodes], nodes=nodes,
                     initializers=constants, opset_imports={"": 21})  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    join(model, slot_branches(model, places))
    assert [o.name for o in model.graph.outputs] == ["gate.y", "up.y"]
    assert Counter(node.op_type for node in model.graph)["Reshape"] == 1 + 2
    given = {"x": np.ones((1, 2, 3), np.float32), "input_ids": np.zeros((1, 2), np.int64)}
    assert answers(model, given).shape == (1, 2, 4)


def packed(slots):
    """One product of 9 columns, and a slot for each (name, first column, last column)."""
    x, ids = value("x", ["b", "t", 3]), value("input_ids", ["b", "t"], ir.DataType.INT64)
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((3, 9), np.float32)))
    node = ir.node("MatMul", [x, weight], name="qkv")
    out = node.outputs[0]
    out.name, out.shape, out.type = "y", ir.Shape(["b", "t", 9]), x.type
    places = [
        Place(Slot(name, 3, b - a, (Member(name, (0, b - a), (0, b - a)),)), x, out, (a, b), 9)
        for name, a, b in slots
    ]
    graph = ir.Graph([x, ids], [out], nodes=[node], initializers=[weight],
                     opset_imports={"": 21})  # fmt: skip
    return ir.Model(graph, ir_version=10), places


@pytest.mark.parametrize(
    "slots",
    [
        [("q", 0, 4), ("k", 4, 6), ("v", 6, 9)],
        [("v", 6, 9), ("q", 0, 4)],
        [("k", 4, 6)],
        [("k", 4, 6), ("v", 6, 9)],
        [("q", 0, 4)],
    ],
)
def test_modules_packed_into_one_value_have_slots_of_their_own(slots):
    model, places = packed(slots)
    given = {"x": RANDOM.normal(size=(2, 5, 3)).astype("f"), "input_ids": np.zeros((2, 5), int)}
    base = answers(packed([])[0], given)
    assert join(model, slot_branches(model, places)) == len(slots)
    assert np.array_equal(answers(model, given), base)
    expected = base.astype(np.float64)
    for rank, (name, first, last) in enumerate(slots, 1):
        a, b = (RANDOM.normal(size=s).astype("f") for s in ((3, rank), (rank, last - first)))
        given |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        expected[..., first:last] += given["x"].astype(np.float64) @ a @ b
    found = answers(model, given)
    assert np.abs(found - expected).max() < 1e-5 < np.abs(base - expected).max()
    only = {k: v for k, v in given.items() if not k.startswith(slots[0][0])}
    first, last = slots[0][1:]
    assert np.array_equal(answers(model, only)[..., first:last], base[..., first:last])
