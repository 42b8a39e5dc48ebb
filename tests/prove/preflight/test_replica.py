"""The small replica of a model: what it keeps, what it shrinks, what it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.prompts import Prompts, choose_prompts
from adaptrix_export.prove.preflight.child import STEPS
from adaptrix_export.prove.preflight.replica import LAYERS, ORIGINAL, WINDOW, save_replica, shrunk

LARGE = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=50000, max_position_embeddings=16384,
)  # fmt: skip
FACTORS = [1.0 + i / 32 for i in range(32)]


def replica(kind: str, **changed: Any) -> dict[str, Any]:
    config = AutoConfig.for_model(kind, **{**LARGE, **changed})
    return shrunk(json.loads(json.dumps(config.to_dict(), default=str)))


def asked(config: dict[str, Any], positions: int) -> Prompts:
    """What the proof of a replica asks, by the lengths of the prompts."""
    nowhere = Path("nowhere")
    job = Job("onnx", nowhere, nowhere, "fp32", {}, decode_steps=STEPS)
    return choose_prompts(job, config["vocab_size"], positions)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
        ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
        ("gemma2", {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 9.0}),
        ("gemma3_text", {"query_pre_attn_scalar": 77, "rope_local_base_freq": 123.0}),
        ("phi", {"partial_rotary_factor": 0.4, "qk_layernorm": True}),
        ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}),
        ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False}),
        ("falcon", {"alibi": True, "multi_query": False, "new_decoder_architecture": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 512}),
        ("opt", {"enable_bias": False, "activation_function": "gelu"}),
        ("olmo", {"clip_qkv": 8.0}),
        ("cohere", {"use_qk_norm": True, "logit_scale": 0.25}),
        ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
        ("smollm3", {"no_rope_layers": [1, 0] * 12}),
        ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1}),
    ],
)  # fmt: skip
def test_every_option_of_the_structure_stays(kind, options):
    found, plain = replica(kind, **options), replica(kind)
    whole = AutoConfig.for_model(kind, **{**LARGE, **options}).to_dict()
    for name, value in options.items():
        if isinstance(value, list):
            assert set(found[name]) == set(value) and found[name] == value[: len(found[name])]
        elif name in whole:  # some are renamed by their config class
            assert found[name] == value
    assert found != plain  # another question, another verdict


@pytest.mark.parametrize(
    ("shared", "kept"), [(32, 4), (8, 2), (1, 1)], ids=["each its own", "groups", "one for all"]
)
def test_heads_stay_grouped_as_they_were(shared, kept):
    found = replica("llama", num_key_value_heads=shared)
    assert found["num_attention_heads"] == 4 and found["num_key_value_heads"] == kept
    assert found["hidden_size"] // found["num_attention_heads"] == 64  # the size of a head


def test_a_projection_is_there_where_it_was_and_nowhere_else():
    assert replica("opt", word_embed_proj_dim=512)["word_embed_proj_dim"] == 512
    found = replica("opt", word_embed_proj_dim=2048)
    assert found["word_embed_proj_dim"] == found["hidden_size"] == 256


def test_one_layer_of_each_kind_is_there():
    assert replica("llama")["num_hidden_layers"] == LAYERS
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    found = replica("gemma3_text", layer_types=kinds * 4)
    assert found["layer_types"] == kinds and found["num_hidden_layers"] == 6


def test_prompts_go_beyond_a_sliding_window_in_every_case():
    found = replica("mistral", sliding_window=4096)
    asked_for = asked(found, found["max_position_embeddings"])
    assert found["sliding_window"] == WINDOW
    assert len(asked_for.prefill) * 3 // 5 > WINDOW  # the first chunk, too
    assert len(asked_for.decode) > WINDOW
    lengths = [len(row) - asked_for.cached for row in asked_for.rows]
    assert max(lengths) > WINDOW > min(lengths)  # one row crosses it while it decodes
    assert min(map(len, asked_for.rows)) > WINDOW


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "longrope", "dynamic"])
def test_prompts_go_beyond_the_range_of_scaled_rotary_embeddings(rope_type):
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type != "dynamic":
        rope["original_max_position_embeddings"] = 4096
    if rope_type == "longrope":
        rope |= {"short_factor": FACTORS, "long_factor": [3 * f for f in FACTORS]}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = replica("llama", rope_parameters=rope)
    kept = found["rope_parameters"]
    name = "original_max_position_embeddings"
    assert {**kept, name: 0} == {**rope, name: 0} | {
        k: v for k, v in kept.items() if k not in rope
    }  # nothing but the range is another
    positions = found["max_position_embeddings"]
    if rope_type == "dynamic":  # its range is the number of positions, and it goes on from there
        assert positions == ORIGINAL
        positions *= 4
    else:
        assert kept[name] == ORIGINAL
    asked_for = asked(found, positions)
    assert len(asked_for.prefill) > ORIGINAL > len(asked_for.prefill) // 5
    assert max(map(len, asked_for.rows)) > ORIGINAL > min(map(len, asked_for.rows))


def test_the_reference_lets_a_dynamic_range_be_passed(tmp_path):
    from adaptrix_export.oracle.reference import Reference

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = replica("llama", rope_parameters=rope)
    save_replica(config, "text-generation", tmp_path)
    reference = Reference.open(Job("onnx", tmp_path, tmp_path, "fp32", {}))
    assert reference.positions == 4 * ORIGINAL


def test_weights_of_a_replica_hide_nothing(tmp_path):
    """No norm of ones, no bias of zeros, and logits that a soft cap bends."""
    import torch
    from transformers import AutoModelForCausalLM

    config = replica("gemma2", sliding_window=64, head_dim=64, attn_logit_softcapping=5.0)
    save_replica(config, "text-generation", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, value in model.named_parameters():
        assert value.std() > 0.01, name
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 43)[None]).logits
    assert 1 < logits.abs().max() < 100
