"""The native front end: interface, counts, left padding, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Concat, Transpose
from adaptrix_export.graph.frontends.native import native
from adaptrix_export.graph.rewrite.padding import needs_left_padding
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from tests.tiny import VOCAB, live, save_adapter, save_base


def plan_of(base, *adapters):
    opened = open_base(str(base))
    return verify(Plan(opened, tuple(open_adapter(str(a), opened) for a in adapters)))


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def built(request, tmp_path):
    base = save_base(request.param, tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "a")
    plan = plan_of(base, adapter)
    (tmp_path / "out").mkdir()
    artifact = lower_merged_onnx(plan, tmp_path / "out", Silent())
    return request.param, plan, artifact, live(base, adapter)


def feed(session, ids, mask, past=None):
    inputs = {i.name: i.shape for i in session.get_inputs()}
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inputs:
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        given["position_ids"] = positions[:, -ids.shape[1] :]
    for name, shape in inputs.items():
        if name.startswith("past_key_values"):
            empty = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
            given[name] = past[name] if past else empty
    outputs = [o.name for o in session.get_outputs()]
    made = dict(zip(outputs, session.run(None, given), strict=True))
    cache = {n.replace("present", "past_key_values"): v for n, v in made.items() if n != "logits"}
    return made["logits"], cache


def alone(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_each_row_alone(built, side):
    """Prefill and four cached steps, rows of 3, 11 and 7 tokens, against PEFT row by row."""
    _, _, artifact, model = built
    session = ort.InferenceSession(artifact.folder / "model.onnx")
    random = np.random.default_rng(0)
    rows = [list(random.integers(0, VOCAB, n)) for n in (3, 11, 7)]
    more = random.integers(0, VOCAB, (3, 4))
    ids = np.full((3, 11), 5, np.int64)
    mask = np.zeros((3, 11), np.int64)
    for i, row in enumerate(rows):
        at = slice(11 - len(row), 11) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    logits, past = feed(session, ids, mask)
    for i, row in enumerate(rows):
        assert np.abs(logits[i, mask[i] == 1] - alone(model, row)).max() < 1e-5
    for step in range(4):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
        logits, past = feed(session, more[:, step : step + 1], mask, past)
        for i, row in enumerate(rows):
            expected = alone(model, [*row, *more[i, : step + 1]])[-1]
            assert np.abs(logits[i, 0] - expected).max() < 1e-5


def test_interface_names_and_symbolic_sizes(built):
    kind, _, artifact, _ = built
    session = ort.InferenceSession(artifact.folder / "model.onnx")
    inputs = {i.name: i for i in session.get_inputs()}
    past = {f"past_key_values.{i}.{kv}" for i in range(4) for kv in ("key", "value")}
    optional = {"position_ids"} if kind == "gpt2" else set()
    assert set(inputs) == {"input_ids", "attention_mask"} | past | optional
    outputs = [o.name for o in session.get_outputs()]
    presents = {n.replace("past_key_values", "present") for n in past}
    assert outputs[0] == "logits" and set(outputs[1:]) == presents
    assert all(isinstance(d, str) for d in inputs["input_ids"].shape)


def test_every_initializer_is_its_expression_over_merged_weights(built):
    """Bytes read back from the artifact, against the live model's weights in float64."""
    kind, plan, artifact, model = built
    import onnx_ir as ir

    graph = ir.load(artifact.folder / "model.onnx").graph
    modules = dict(model.named_modules())

    def weight(name):
        path, _, last = name.rpartition(".")
        layer = modules["base_model.model." + path]
        if not hasattr(layer, "lora_A"):
            return getattr(layer, last).detach().double().numpy()
        exact = getattr(layer.base_layer, last).detach().double()
        if last == "bias":
            return exact.numpy()
        a, b = layer.lora_A["a0"].weight.double(), layer.lora_B["a0"].weight.double()
        delta = (layer.scaling["a0"] * (b @ a)).detach()
        return (exact + (delta.T if kind == "gpt2" else delta)).numpy()

    assert {n for e in artifact.weights.values() for n in e.names()} == set(plan.base.tensors)
    for name, expression in artifact.weights.items():
        ours = graph.initializers[name].const_value.numpy()
        assert np.array_equal(ours, expression.evaluate(weight).astype(np.float32)), name


def test_counts_of_folds_and_rolls(tmp_path):
    """Packed QKV is one initializer; of the Transposes of weights only the tied head's is left."""
    plan = plan_of(save_base("llama", tmp_path))
    graph = native(plan, "cpu")
    kinds = [n.op_type for n in graph.model.graph]
    assert kinds.count("Transpose") == 1 and kinds.count("Concat") == 0
    assert kinds.count("MatMul") == 4 * 5 + 1 and kinds.count("GroupQueryAttention") == 4
    assert (
        sum(isinstance(e, Transpose) and isinstance(e.of, Concat) for e in graph.weights.values())
        == 4
    )
    assert graph.unused == ()
    assert needs_left_padding(graph.model)
    assert kinds.count("GatherND") == 2  # tokens and hidden states; positions are internal
    gpt2 = native(plan_of(save_base("gpt2", tmp_path / "gpt2")), "cpu")
    assert sum(n.op_type == "GatherND" for n in gpt2.model.graph) == 3


def test_same_inputs_same_bytes(tmp_path):
    base = save_base("qwen3", tmp_path / "base")
    plan = plan_of(base, save_adapter(base, tmp_path / "a"))
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(lower_merged_onnx(plan, tmp_path / name, Silent()).hashes)
    assert hashes[0] == hashes[1]


def test_an_unknown_model_type_is_refused(tmp_path):
    base = save_base("llama", tmp_path)
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"llama"', '"no_such_type"'))
    with pytest.raises(UnsupportedError, match="'no_such_type'.*no native front end"):
        native(plan_of(base), "cpu")
