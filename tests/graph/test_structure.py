"""What a front end gives is checked before a weight is written: each fault is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends.draw import FRONTENDS, draw
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.structure import check_structure
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from tests.artifacts import plan_of
from tests.tiny import save_base


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(save_base("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=1))


@pytest.fixture
def graph(plan: Plan) -> Graph:
    return FRONTENDS["native"](plan, "cpu", Silent())


def output(graph: Graph, name: str) -> ir.Value:
    return next(value for value in graph.model.graph.outputs if value.name == name)


def some(graph: Graph) -> ir.Value:
    return graph.model.graph.initializers[next(iter(graph.weights))]


def no_present(graph: Graph) -> None:
    graph.model.graph.outputs.remove(output(graph, "present.0.key"))


def renamed(graph: Graph) -> None:
    output(graph, "present.0.value").name = "past_out.0.value"


def no_cache(graph: Graph) -> None:
    graph.model.graph.outputs[:] = [output(graph, "logits")]
    kept = [v for v in graph.model.graph.inputs if not str(v.name).startswith("past_")]
    graph.model.graph.inputs[:] = kept


def another_type(graph: Graph) -> None:
    ids = next(v for v in graph.model.graph.inputs if v.name == "input_ids")
    ids.type = ir.TensorType(ir.DataType.FLOAT)


def another_rank(graph: Graph) -> None:
    output(graph, "logits").shape = ir.Shape(["batch", 300])


def integers(graph: Graph) -> None:
    some(graph).type = ir.TensorType(ir.DataType.INT64)


def no_value(graph: Graph) -> None:
    free = ir.Value(name="free", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.model.graph.initializers["free"] = free


def contradicted(graph: Graph) -> None:
    said = ir.Value(name="said", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT))
    said.const_value = ir.tensor(np.zeros(2, np.float32))
    graph.model.graph.initializers["said"] = said


def unknown_operator(graph: Graph) -> None:
    next(n for n in graph.model.graph if n.op_type == "MatMul").op_type = "MatMull"


FAULTS: dict[Callable[[Graph], None], str] = {
    no_present: "past_key_values.0.key: no present.0.key, expected a present for each past",
    renamed: "past_key_values.0.value: no present.0.value",
    no_cache: "inputs: no cache",
    another_type: "input_ids: type FLOAT, expected INT64",
    another_rank: "logits: rank 2, expected 3",
    integers: "type INT64, expected FLOAT",
    no_value: "free: an initializer without a value",
    contradicted: "said: ",
    unknown_operator: "onnx.checker: No Op registered for MatMull",
}


def test_a_right_graph_passes_and_is_left_as_it_was(plan: Plan, graph: Graph) -> None:
    before = {name: value.const_value for name, value in graph.model.graph.initializers.items()}
    check_structure(graph.model, graph.weights, plan, "native")
    after = {name: value.const_value for name, value in graph.model.graph.initializers.items()}
    assert before == after


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_is_named(plan: Plan, graph: Graph, fault: Callable[[Graph], None]) -> None:
    fault(graph)
    with pytest.raises(UnsupportedError) as caught:
        check_structure(graph.model, graph.weights, plan, "native")
    assert FAULTS[fault] in str(caught.value)


def test_draw_checks_the_structure(
    plan: Plan, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_present(graph)
    monkeypatch.setitem(FRONTENDS, "native", lambda *_: graph)
    with pytest.raises(UnsupportedError, match="no present.0.key"):
        draw(plan, "cpu", "native", Silent())


def test_tensors_of_integers_are_no_weights(tmp_path: Path, plan: Plan, graph: Graph) -> None:
    """A base that stores a buffer of integers under the name of a weight."""
    from dataclasses import replace

    name = next(iter(graph.weights))
    source = next(iter(plan.base.tensors))
    stored = replace(plan.base.tensors[source], dtype="I64")  # type: ignore[type-var]
    other = replace(plan, base=replace(plan.base, tensors={**plan.base.tensors, source: stored}))
    from adaptrix_export.graph.expression import TensorRef

    with pytest.raises(UnsupportedError, match="which is I64"):
        check_structure(graph.model, {**graph.weights, name: TensorRef(source)}, other, "native")
