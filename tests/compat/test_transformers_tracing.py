"""What is done to transformers while a trace runs: windows and distances in tokens, caches without
a memory; and to the rewrite rules that simplify its graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import optimizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_bidirectional_sliding_window_mask,
    create_sliding_window_causal_mask,
)

from adaptrix_export.compat.onnxscript import exactly_matched
from adaptrix_export.compat.transformers import cache_name
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.frontends import traced as module
from adaptrix_export.graph.frontends.traced_sample import PAST, sample_of
from adaptrix_export.graph.frontends.weightless import weightless
from adaptrix_export.progress import Silent
from tests.artifacts import plan_of
from tests.tiny import config_of, save_base
from tests.tools.zoo_rows import ONE_TASK

WINDOW = 3
# five tokens and three pads: before them, after some of them, between them
ROWS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1]])


def window_config(attention: str):
    config = AutoConfig.for_model("mistral", sliding_window=WINDOW)
    config._attn_implementation = attention
    return config


def seen(attention: str, task: str) -> list[list[list[bool]]]:
    """For each row, which of its five tokens each of its tokens sees."""
    with traceable(task == "text-generation"):
        mask = create_sliding_window_causal_mask(
            window_config(attention), torch.zeros(3, 8, 4), ROWS, None
        )
    visible = mask if mask.dtype == torch.bool else mask == 0
    return [
        visible[r, 0][ROWS[r] == 1][:, ROWS[r] == 1].tolist() for r in range(len(ROWS))
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_counts_the_tokens_of_a_row_wherever_its_pads_are(attention):
    expected = [[i - WINDOW < j <= i for j in range(5)] for i in range(5)]
    assert seen(attention, "text-generation") == [expected] * 3
    # Negative control: places are counted where no cache is, and pads then use up the window.
    by_place = seen(attention, "feature-extraction")
    assert by_place[0] == expected != by_place[1]


def test_the_masks_of_encoders_and_the_registry_itself_stay_as_they_are():
    before = dict(AttentionMaskInterface._global_mapping)
    config = window_config("sdpa")
    plain = create_bidirectional_sliding_window_mask(config, torch.zeros(3, 8, 4), ROWS)
    with traceable(generation=False):
        found = create_bidirectional_sliding_window_mask(config, torch.zeros(3, 8, 4), ROWS)
    assert torch.equal(plain, found)
    with traceable(generation=True):
        assert AttentionMaskInterface._global_mapping["sdpa"] is not before["sdpa"]
    assert before == AttentionMaskInterface._global_mapping


def test_a_traced_cache_keeps_every_token_of_a_sliding_layer():
    """One that forgets would freeze the number of tokens of the sample into the graph."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = config_of("qwen3", layer_types=kinds, sliding_window=2, use_sliding_window=True)
    assert any(DynamicCache(config=config).is_sliding)
    model = weightless(config, "text-generation")
    cache = sample_of(model, "text-generation").inputs[cache_name()]
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 4
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(2, 2, PAST, 32)}


def test_making_a_sample_leaves_no_fake_frequencies_in_the_model():
    """Longrope keeps what it computed in the model; what a fake call computes is no number."""
    factors = [1.0 + i / 8 for i in range(8)]
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors,
        "long_factor": [2 * f for f in factors], "original_max_position_embeddings": 32,
        "factor": 4.0,
    }  # fmt: skip
    model = weightless(config_of("llama", rope_parameters=rope), "text-generation")
    sample_of(model, "text-generation")
    rotary = model.model.rotary_emb
    assert type(rotary.inv_freq) is torch.Tensor and torch.isfinite(rotary.inv_freq).all()
    assert type(getattr(rotary, "long_inv_freq", rotary.inv_freq)) is torch.Tensor


@pytest.mark.parametrize("length", [16, 100])
def test_dynamically_scaled_frequencies_follow_from_the_length_alone(length):
    """Within the range of 32 and beyond it, as transformers has them for one growing sequence."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = config_of("llama", rope_parameters=rope, max_position_embeddings=32)
    model = weightless(config, "text-generation")
    sample_of(model, "text-generation")
    x, places = torch.zeros(1, length, 64), torch.arange(length)[None]
    found = model.model.rotary_emb(x, places)
    expected = LlamaRotaryEmbedding(config)(x, places)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    plain = LlamaRotaryEmbedding(config_of("llama"))(x, places)
    assert torch.allclose(plain[0], found[0], atol=1e-6) == (length <= 32)


def test_a_trace_tells_what_it_is_at_before_its_minutes_begin(tmp_path, monkeypatch):
    """And what torch raises is a refusal with the type of the model and of the error."""
    begun = []

    class Told(Silent):
        def stage(self, name, total=None, unit=""):
            begun.append(name)
            return super().stage(name, total, unit)

    def export(*_):
        torch.nn.Linear(2, 2)(torch.zeros(3))  # raises in the code of torch

    monkeypatch.setattr(module, "export", export)
    plan = plan_of(save_base("llama", tmp_path))
    with pytest.raises(UnsupportedError, match="'llama'.*RuntimeError: mat1.*safetens"):
        module.traced(plan, "cpu", Told())
    assert begun == [
        "tracing: model without weights", "tracing: 4 layers, which can take minutes",
    ]  # fmt: skip


def optimized(constant):
    """sqrt(x + constant) of zeros, after the optimizer."""
    graph = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float small = {{{constant}}}>
        {{ s = Add(x, small)  y = Sqrt(s) }}"""
    )
    optimizer.optimize(graph)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    return session.run(None, {"x": np.zeros(2, np.float32)})[0]


@pytest.mark.parametrize("constant", ["1e-8", "1e-12"])
def test_a_small_epsilon_is_not_taken_for_zero(constant):
    with exactly_matched():
        assert np.allclose(optimized(constant), np.sqrt(float(constant)), rtol=1e-6)
    assert not optimized(constant).any(), "control: without the patch it is dropped"


def test_what_is_zero_is_still_dropped():
    graph = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float nothing = {0.0}>
        { s = Add(x, nothing)  y = Sqrt(s) }"""
    )
    with exactly_matched():
        optimizer.optimize(graph)
    assert [node.op_type for node in graph.graph] == ["Sqrt"]


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt"])
def test_pads_behind_a_row_take_no_part_in_windows_and_distances(kind):
    """A row, its pads, then more of it: as if the pads were not there, which stock code fails."""
    torch.manual_seed(0)
    config = next(animal.config for animal in ONE_TASK if animal.kind == kind)
    made = AutoConfig.for_model(kind, **config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, 300, (1, 30))
    pads = torch.full((1, 5), 2)
    padded = torch.cat([ids[:, :20], pads, ids[:, 20:]], 1)
    mask = (padded != 2).long()
    mask[:, :20] = mask[:, 25:] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    asked = {"input_ids": padded, "attention_mask": mask}
    if kind == "gpt_neo":
        asked["position_ids"] = places
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
        stock = model(**asked).logits[:, 25:]
        with traceable(generation=True):
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 20:]
            found = model(**asked).logits[:, 25:]
    assert (found - expected).abs().max() <= 1e-5
    assert (alone - expected).abs().max() <= 1e-5
    assert (stock - expected).abs().max() > 1e-3, "control: stock code counts the pads"
