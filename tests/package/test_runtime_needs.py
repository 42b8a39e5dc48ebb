"""The oldest ONNX Runtime of a graph, row by row, and in a manifest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from adaptrix_export.package.runtime_needs import oldest_runtime, runtime_needs
from tests.artifacts import packaged

NEWEST = ".".join(onnxruntime.__version__.split(".")[:2])


def graph_of(op: str, inputs: int, opset: int = 18, ir_version: int = 8, **attributes: int):
    x = ir.val("x", ir.DataType.FLOAT, ["a"])
    node = ir.node(op, [x] * inputs, attributes=attributes, domain="com.microsoft")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": opset, "com.microsoft": 1})
    return ir.Model(graph, ir_version=ir_version)


@pytest.mark.parametrize(
    ("model", "release"),
    [
        (graph_of("Gelu", 1), "1.18"),
        (graph_of("Gelu", 1, opset=21, ir_version=10), "1.18"),
        (graph_of("Gelu", 1, opset=22, ir_version=10), "1.21"),
        (graph_of("Gelu", 1, opset=23, ir_version=11), "1.23"),
        (graph_of("Gelu", 1, opset=24, ir_version=12), "1.24"),
        (graph_of("Gelu", 1, opset=99), NEWEST),
        (graph_of("GroupQueryAttention", 9, num_heads=4), "1.18"),
        (graph_of("GroupQueryAttention", 9, softcap=1), "1.20"),
        (graph_of("GroupQueryAttention", 11, smooth_softmax=1), "1.22"),
        (graph_of("GroupQueryAttention", 12), NEWEST),
        (graph_of("GroupQueryAttention", 9, of_tomorrow=1), NEWEST),
        (graph_of("MatMulNBits", 4, bits=4), "1.18"),
        (graph_of("MatMulNBits", 4, bits=8), "1.23"),
        (graph_of("MatMulNBits", 4, bits=2), "1.24"),
        (graph_of("GatherBlockQuantized", 3), "1.20"),
        (graph_of("OfTomorrow", 1), NEWEST),
    ],
)
def test_the_newest_part_of_a_graph_decides(model, release):
    assert oldest_runtime(model) == release


def test_inputs_left_out_at_the_end_do_not_count():
    model = graph_of("GroupQueryAttention", 9)
    node = model.graph[0]
    node.resize_inputs(12)
    assert oldest_runtime(model) == "1.18"


def test_the_manifest_names_the_runtime_and_a_folder_without_a_graph_none(tmp_path):
    artifact, _ = packaged("llama", tmp_path)
    needs = runtime_needs(artifact.folder)
    assert needs is not None and needs["minimum"] == "1.18"
    assert list(needs["graphs"].values()) == [{"opset": 18, "ir_version": 8}]
    assert runtime_needs(tmp_path / "base") is None


@pytest.mark.parametrize(("columns", "release"), [(0, "1.20"), (4, "1.18")])
def test_a_slot_that_is_empty_by_default_needs_a_gemm_over_no_columns(columns, release):
    model = graph_of("Gelu", 1)
    slot = ir.val("a", ir.DataType.FLOAT, ["rank", 8])
    slot.const_value = ir.tensor(np.zeros((columns, 8), np.float32), name="a")
    model.graph.inputs.append(slot)
    model.graph.register_initializer(slot)
    assert oldest_runtime(model) == release
