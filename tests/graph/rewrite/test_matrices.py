"""What acts on each token by itself acts on matrices between two slots; all else gets axes back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.graph.rewrite.slot_sums import join
from adaptrix_export.graph.rewrite.slots import Member, Place, Slot, slot_branches

RANDOM = np.random.default_rng(0)
WIDTH = 4
AXES = ("batch", "tokens", WIDTH)


def value(name, shape, kind=ir.DataType.FLOAT):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


class Drawn:
    """x -> a product with a slot -> `between` -> another one, and a residual around all of it."""

    def __init__(self, *between):
        self.x = value("x", AXES)
        self.ids = value("input_ids", AXES[:2], ir.DataType.INT64)
        self.nodes, self.constants, self.places = [], [], []
        self.random = np.random.default_rng(1)  # the same weights each time
        first = self.product("first", self.x)
        middle = first
        for kind, *arrays in between:
            middle = self.node(kind, middle, *arrays)
        summed = self.node("Add", middle, first)
        last = self.product("last", summed)
        self.node("Add", last, summed)
        graph = ir.Graph([self.x, self.ids], [self.nodes[-1].outputs[0]], nodes=self.nodes,
                         initializers=self.constants, opset_imports={"": 23})  # fmt: skip
        self.model = ir.Model(graph, ir_version=10)

    def node(self, kind, *inputs):
        kind, attributes = kind if isinstance(kind, tuple) else (kind, None)
        given = [v if isinstance(v, ir.Value) else self.constant(v) for v in inputs]
        made = ir.node(kind, given, attributes)
        out = made.outputs[0]
        out.name = made.name = f"{kind}.{len(self.nodes)}"
        out.shape, out.type = ir.Shape(AXES), ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(made)
        return out

    def constant(self, array):
        name = f"constant{len(self.constants)}"
        tensor = ir.tensor(array, name=name)
        self.constants.append(ir.Value(name=name, shape=tensor.shape, const_value=tensor))
        return self.constants[-1]

    def product(self, name, x):
        weight = self.random.normal(size=(WIDTH, WIDTH)).astype("f")
        out = self.node("MatMul", x, weight)
        slot = Slot(name, WIDTH, WIDTH, (Member(name, (0, WIDTH), (0, WIDTH)),))
        self.places.append(Place(slot, x, out, (0, WIDTH), WIDTH))
        return out


def run(model, given):
    data = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, given)[0]


ROW = RANDOM.normal(size=WIDTH).astype("f")
TABLE = RANDOM.normal(size=(5, WIDTH)).astype("f")  # a row a token: not for each by itself
OPERATORS = {
    "one token by itself": (["Tanh", ("Mul", ROW), ("RMSNormalization", ROW)], 2),
    "a norm, its axis named": ([(("LayerNormalization", {"axis": -1}), ROW)], 2),
    "a norm of tokens": ([(("LayerNormalization", {"axis": 1}), TABLE)], 4),
    "a sum over positions": ([("Add", TABLE)], 4),
    "tokens together": ([(("Softmax", {"axis": 1}),)], 4),
    "tokens together, then one by itself": ([("CumSum", np.array(1)), "Tanh"], 4),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_matrices_from_product_to_product_and_the_same_result(kind):
    between, reshapes = OPERATORS[kind]
    between = [b if isinstance(b, tuple) else (b,) for b in between]
    given = {"x": RANDOM.normal(size=(2, 5, WIDTH)).astype("f"), "input_ids": np.zeros((2, 5), int)}
    base = run(Drawn(*between).model, given)
    drawn, settled = Drawn(*between), Drawn(*between)
    join(drawn.model, slot_branches(drawn.model, drawn.places), settle=False)
    join(settled.model, slot_branches(settled.model, settled.places))
    assert Counter(n.op_type for n in settled.model.graph)["Reshape"] == reshapes
    for name in ("first", "last"):
        given[f"{name}.lora_A"] = RANDOM.normal(size=(WIDTH, 2)).astype("f")
        given[f"{name}.lora_B"] = RANDOM.normal(size=(2, WIDTH)).astype("f")
    found = run(settled.model, given)
    assert found.shape == base.shape
    assert np.array_equal(found, run(drawn.model, given))
    assert not np.allclose(found, base)
