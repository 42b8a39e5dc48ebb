"""The pooled output, in ONNX Runtime, against numpy; and in a build."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from adaptrix_export.errors import ParityError, RecipeError, UnsupportedError
from adaptrix_export.graph.rewrite.pooling import wire_pooling
from adaptrix_export.oracle.encoded import pooled
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.test_tasks import save_trained
from tests.tiny import auto_of, save_adapter, save_base


def features() -> ir.Model:
    """hidden states in, hidden states out."""
    kinds = {"hidden": (ir.DataType.FLOAT, ("batch", "length", 4)),
             "attention_mask": (ir.DataType.INT64, ("batch", "length"))}  # fmt: skip
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        for name, (kind, shape) in kinds.items()
    ]
    same = ir.node("Identity", [inputs[0]])
    out = same.outputs[0]
    out.name, out.shape, out.type = "last_hidden_state", inputs[0].shape, inputs[0].type
    graph = ir.Graph(inputs, [out], nodes=[same], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("kind", "nodes"),
    [
        ("mean", 7), ("cls", 1), ("max", 5), ("mean_sqrt_len", 8), ("weightedmean", 11),
        ("lasttoken", 10), ("cls+mean", 9), ("max+mean+lasttoken", 18),
    ],
)  # fmt: skip
@pytest.mark.parametrize("left", [False, True])
def test_the_output_is_what_the_library_makes(kind, nodes, left):
    model = features()
    assert wire_pooling(model, kind) == nodes
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    hidden = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1] * 5, [1, 1, 1, 0, 0], [0] * 5])[:, :: -1 if left else 1]
    (found,) = session.run(["sentence_embedding"], {"hidden": hidden, "attention_mask": mask})
    expected = pooled(hidden, mask, kind)[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    real = hidden[1][mask[1] == 1]
    places = np.flatnonzero(mask[1]) + 1.0
    by_hand = {
        "mean": real.mean(0), "max": real.max(0), "lasttoken": real[-1],
        "mean_sqrt_len": real.sum(0) / 3**0.5,
        "weightedmean": (real * places[:, None]).sum(0) / places.sum(),
    }  # fmt: skip
    if kind in by_hand:
        np.testing.assert_allclose(found[1], by_hand[kind], atol=1e-6)
    if kind not in ("cls", "max") and "+" not in kind:
        assert not found[2].any()  # a row of pads alone


def test_a_graph_without_hidden_states_is_refused():
    model = features()
    model.graph.outputs[0].name = "logits"
    with pytest.raises(UnsupportedError, match="a graph without last_hidden_state"):
        wire_pooling(model, "mean")


def test_pooling_asks_for_features_on_onnx(tmp_path):
    wanted = {"base": "b", "adapters": ("a",), "out": tmp_path / "out", "pooling": "mean"}
    with pytest.raises(RecipeError, match="pooling mean with target safetensors"):
        Recipe(**wanted, target="safetensors")
    base = save_base("llama", tmp_path / "base", num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "a")
    with pytest.raises(UnsupportedError, match="task text-generation"):
        build(Recipe(**{**wanted, "base": str(base), "adapters": (str(adapter),)}, target="onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_a_pooled_encoder_is_proved(tmp_path, monkeypatch, kind):
    base = save_base("bert", tmp_path / "base", num_hidden_layers=2)
    adapter = save_trained(
        auto_of("bert").from_pretrained(base), tmp_path / "a", target_modules="all-linear"
    )
    recipe = Recipe(
        base=str(base), adapters=(str(adapter),), target="onnx", out=tmp_path / "out", pooling=kind,
        frontend="native",
    )  # fmt: skip
    report = build(recipe).report
    assert report is not None and report["cases"][-1]["name"] == "sentence embedding"
    other = {"mean": "cls", "cls": "mean"}[kind]
    monkeypatch.setattr(  # negative control: the graph pools otherwise than the recipe says
        "adaptrix_export.targets.merged_onnx.wire_pooling", lambda m, _: wire_pooling(m, other)
    )
    with pytest.raises(ParityError) as caught:
        build(recipe.model_copy(update={"out": tmp_path / "wrong"}))
    assert caught.value.report is not None
    failed = [c["name"] for c in caught.value.report["cases"] if not c["passed"]]
    assert failed == ["sentence embedding"]
