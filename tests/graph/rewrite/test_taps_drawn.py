"""Taps in graphs drawn by hand: the forms that other front ends give a Linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import (
    Affine,
    Expression,
    Reshape,
    Slice,
    TensorRef,
    Transpose,
)
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.taps import Tap, columns_of, joined, low_rank, replace_uses, taps
from adaptrix_export.plan import Plan, Site
from tests.artifacts import plan_of
from tests.tiny import save_base

SITE = Site("transformer.h", 1, "attn.c_attn")  # Conv1D (64, 192), with a bias
WEIGHT, BIAS = TensorRef(f"{SITE.path}.weight"), TensorRef(f"{SITE.path}.bias")
TURNED = Transpose((1, 0), WEIGHT)
FLOAT = ir.TensorType(ir.DataType.FLOAT)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(save_base("gpt2", tmp_path_factory.mktemp("base")))


class Drawing:
    """x (batch, tokens, 64) and nodes after one another, the last of which makes y."""

    def __init__(self) -> None:
        self.x = ir.Value(name="x", shape=ir.Shape(["batch", "tokens", 64]), type=FLOAT)
        self.weights: dict[str, Expression] = {}
        self.values: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def weight(self, name: str, shape: tuple[int, ...], expression: Expression) -> ir.Value:
        self.weights[name] = expression
        self.values[name] = ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)
        return self.values[name]

    def numbers(self, name: str, *numbers: int) -> ir.Value:
        made = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
        self.values[name] = ir.Value(name=name, const_value=made, shape=ir.Shape([len(numbers)]),
                                     type=ir.TensorType(ir.DataType.INT64))  # fmt: skip
        return self.values[name]

    def add(self, kind: str, *inputs: ir.Value, **options: Any) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=options or None)
        node.outputs[0].name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def graph(self, y: ir.Value) -> Graph:
        y.type, y.shape = FLOAT, ir.Shape(["batch", "tokens", None])
        drawn = ir.Graph([self.x], [y], nodes=self.nodes, name="drawn", opset_imports={"": 21},
                         initializers=list(self.values.values()))  # fmt: skip
        return Graph(ir.Model(drawn, ir_version=10), self.weights, "drawn", ())


def matmul() -> Graph:
    made = Drawing()
    y = made.add("MatMul", made.x, made.weight("w", (64, 192), WEIGHT))
    return made.graph(made.add("Add", made.weight("b", (192,), BIAS), y))


def unfolded() -> Graph:
    made = Drawing()
    turned = made.add("Transpose", made.weight("w", (192, 64), TURNED), perm=[1, 0])
    y = made.add("MatMul", made.x, turned)
    return made.graph(made.add("Add", y, made.weight("b", (192,), BIAS)))


def gemm() -> Graph:
    made = Drawing()
    flat = made.add("Reshape", made.x, made.numbers("flat", -1, 64))
    y = made.add("Gemm", flat, made.weight("w", (192, 64), TURNED),
                 made.weight("b", (192,), BIAS), transB=1)  # fmt: skip
    return made.graph(made.add("Reshape", y, made.numbers("back", 2, -1, 192)))


def gemm_unturned() -> Graph:
    made = Drawing()
    flat = made.add("Reshape", made.x, made.numbers("flat", -1, 64))
    y = made.add("Gemm", flat, made.weight("w", (64, 192), WEIGHT), made.weight("b", (192,), BIAS))
    return made.graph(made.add("Reshape", y, made.numbers("back", 2, -1, 192)))


def cut() -> Graph:
    """The weight in two MatMuls, side by side again at the end; the bias cut as well."""
    made = Drawing()
    parts = []
    for i, (start, stop) in enumerate(((0, 80), (80, 192))):
        w = made.weight(f"w{i}", (64, stop - start), Slice(1, start, stop, WEIGHT))
        b = made.weight(f"b{i}", (stop - start,), Slice(0, start, stop, BIAS))
        parts.append(made.add("Add", made.add("MatMul", made.x, w), b))
    return made.graph(made.add("Concat", *parts, axis=-1))


def bias_elsewhere() -> Graph:
    made = Drawing()
    y = made.add("MatMul", made.x, made.weight("w", (64, 192), WEIGHT))
    kept = made.add("Identity", y)
    return made.graph(made.add("Add", kept, made.weight("b", (192,), BIAS)))


FORMS: dict[str, tuple[Callable[[], Graph], int, bool, bool]] = {
    # form: how it is drawn, pieces, flat, biased
    "matmul": (matmul, 1, False, True),
    "unfolded": (unfolded, 1, False, True),
    "gemm": (gemm, 1, True, True),
    "gemm unturned": (gemm_unturned, 1, True, True),
    "cut": (cut, 2, False, True),
    "bias elsewhere": (bias_elsewhere, 1, False, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_branch_at_the_tap_is_the_adapted_layer(form: str, plan: Plan) -> None:
    drawn, pieces, flat, biased = FORMS[form]
    graph = drawn()
    (tap,) = taps(plan, graph, [SITE]).values()
    assert (len(tap.pieces), tap.flat) == (pieces, flat)
    assert {piece.biased for piece in tap.pieces} == {biased}
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 3)), rng.standard_normal((3, 192))
    x = np.float32(rng.standard_normal((2, 5, 64)))
    found = _run(plan, graph, tap, np.float32(a), np.float32(b), x)
    stored = plan.base.tensors
    weight, bias = (stored[f"{SITE.path}.{n}"].read().astype(float) for n in ("weight", "bias"))
    np.testing.assert_allclose(found, x @ (weight + a @ b) + bias, rtol=1e-4, atol=1e-4)


def _run(
    plan: Plan, graph: Graph, tap: Tap, a: np.ndarray, b: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The graph with the branch added to every piece of the module's output."""
    from adaptrix_export.targets.merged_onnx import Values

    inits = graph.model.graph.initializers
    for name, array in (("branch.a", a), ("branch.b", b)):
        inits[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    delta = low_rank(graph.model, tap, inits["branch.a"], inits["branch.b"], "branch")
    rows, nodes = columns_of(
        graph.model, delta, tap.outputs, [p.rows for p in tap.pieces], "branch.rows"
    )
    made = []
    for piece in tap.pieces:
        added = ir.node("Add", [piece.value, rows[piece.rows]])
        added.outputs[0].name = f"added.{piece.rows[0]}"
        nodes.append(added)
        made.append(joined([added.outputs[0]], "unused")[0])
    graph.model.graph.extend(nodes)
    for piece, value in zip(tap.pieces, made, strict=True):
        replace_uses(graph.model, piece.value, value, nodes)
    graph.model.graph.sort()
    for name, expression in graph.weights.items():
        array = np.ascontiguousarray(Values(plan)(expression))
        inits[name].const_value = ir.tensor(array, name=name)
    session = ort.InferenceSession(ir.serde.serialize_model(graph.model).SerializeToString())
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def rearranged() -> Graph:
    made = Drawing()
    mixed = Reshape((64, 192), Transpose((1, 0), Reshape((96, 128), WEIGHT)))
    return made.graph(made.add("MatMul", made.x, made.weight("w", (64, 192), mixed)))


def computed() -> Graph:
    made = Drawing()
    doubled = Affine(2.0, 0.0, WEIGHT)
    return made.graph(made.add("MatMul", made.x, made.weight("w", (64, 192), doubled)))


def scaled() -> Graph:
    made = Drawing()
    flat = made.add("Reshape", made.x, made.numbers("flat", -1, 64))
    y = made.add("Gemm", flat, made.weight("w", (64, 192), WEIGHT), alpha=0.5)
    return made.graph(y)


def half() -> Graph:
    made = Drawing()
    w = made.weight("w", (64, 80), Slice(1, 0, 80, WEIGHT))
    return made.graph(made.add("MatMul", made.x, w))


def twice() -> Graph:
    made = Drawing()
    w = made.weight("w", (64, 192), WEIGHT)
    return made.graph(made.add("Add", made.add("MatMul", made.x, w), made.add("MatMul", made.x, w)))


def convolved() -> Graph:
    made = Drawing()
    w = made.weight("w", (192, 64), TURNED)
    kernel = made.add("Unsqueeze", w, made.numbers("last", 2))
    return made.graph(made.add("Conv", made.x, kernel))


def unread() -> Graph:
    made = Drawing()
    return made.graph(made.add("Identity", made.x))


@pytest.mark.parametrize(
    ("drawn", "why"),
    [
        (rearranged, "rearranges"), (computed, "computes with"), (scaled, "scales"),
        (half, "in parts"), (twice, "in parts"), (convolved, "Unsqueeze"), (unread, "no MatMul"),
    ],
)  # fmt: skip
def test_what_has_no_tap_is_refused_by_name(
    drawn: Callable[[], Graph], why: str, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=why) as caught:
        taps(plan, drawn(), [SITE])
    assert SITE.path in str(caught.value)
