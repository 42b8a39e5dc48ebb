"""What name_interface does with the names that an exporter gives, whichever word it has."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends.traced_interface import name_interface


def traced(*outputs: str, cache: str = "input.cache", layers: int = 2) -> ir.Model:
    """A graph whose every output is an Identity of an input."""
    ids = ir.val("input_ids", ir.DataType.INT64, ["a", "b"])
    mask = ir.val("attention_mask", ir.DataType.INT64, ["a", "c"])
    past = [
        ir.val(f"{cache}.layers.{i}.{part}", ir.DataType.FLOAT, ["a", 2, "d", 8])
        for i in range(layers)
        for part in ("keys", "values")
    ]
    nodes, made = [], []
    for name in outputs:
        source = next((v for v in past if str(v.name).split(".")[-3:] == name.split(".")[-3:]), ids)
        node = ir.node("Identity", [source])
        made.append(node.outputs[0])
        made[-1].name, made[-1].shape, made[-1].type = name, source.shape, source.type
        nodes.append(node)
    graph = ir.Graph([mask, *past, ids], made, nodes=nodes, opset_imports={"": 20}, name="traced")
    return ir.Model(graph, ir_version=10)


def cache_of(word: str, layers: int = 2) -> list[str]:
    parts = ("keys", "values")
    return [f"{word}.layers.{i}.{part}" for i in range(layers) for part in parts]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ("input.past_key_values", "output.past_key_values"),  # transformers 5.23
        ("input.cache", "output.cache"),  # 5.24
        ("past_key_values", "cache"),  # 5.24, called by the old name
    ],
)
def test_the_word_for_the_cache_is_read_from_the_graph(inputs, outputs):
    model = traced("pooler_output", *cache_of(outputs), "logits", cache=inputs)
    name_interface(model, "logits")
    past = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask", *past]
    present = [name.replace("past_key_values", "present") for name in past]
    assert [v.name for v in model.graph.outputs] == ["logits", *present]
    assert str(model.graph.inputs[1].shape) == "[batch,total_sequence_length]"
    assert str(model.graph.inputs[2].shape) == "[batch,2,past_sequence_length,8]"


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (["logits", *cache_of("output.cache"), "state.layers.0.mean"], "named state.layers.0.mean"),
        (["logits", *cache_of("output.cache"), "cache.conv.0"], "named cache.conv.0"),
        (
            ["logits", *cache_of("output.cache")[:3]],
            "one side alone of a cache: .*1.val",
        ),
        (["logits"], "one side alone of a cache: input.cache.layers.0.keys"),
        (["logits", *cache_of("a"), *cache_of("b")], "two caches, a.layers.0.keys and b.layers.0"),
        ([*cache_of("output.cache"), "scores"], "the outputs .*scores"),
    ],
)
def test_an_output_that_is_not_understood_is_refused(outputs, reason):
    with pytest.raises(UnsupportedError, match=reason):
        name_interface(traced(*outputs), "logits")


def test_a_graph_without_a_cache_has_one_length():
    model = traced("last_hidden_state", "pooler_output", layers=0)
    name_interface(model, "last_hidden_state")
    assert [v.name for v in model.graph.outputs] == ["last_hidden_state"]
    assert str(model.graph.inputs[1].shape) == "[batch,sequence_length]"
