"""Merged values: one rounding of the float64 sum, in blocks, in the base's dtype."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.merge import blocks
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.rounding import to_dtype
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets.merged_safetensors import lower_merged_safetensors
from tests.tiny import VOCAB, live, save_adapter, save_base


def nearest_bf16(value: float) -> set[float]:
    """The bf16 neighbours at the smallest distance, ties to the even one: exact arithmetic."""
    near = np.float32(value).astype(ml_dtypes.bfloat16)
    bits = int(near.view(np.uint16))
    around = [np.uint16((bits + d) & 0xFFFF).view(ml_dtypes.bfloat16) for d in (-1, 0, 1)]
    finite = [c for c in around if np.isfinite(c)]
    distance = {float(c): abs(Fraction(float(c)) - Fraction(value)) for c in finite}
    best = min(distance.values())
    tied = [c for c in finite if distance[float(c)] == best]
    even = [c for c in tied if int(c.view(np.uint16)) % 2 == 0]
    return {float(c) for c in (even if len(tied) > 1 else tied)}


@given(st.floats(-1e30, 1e30))
@example(1.00390625)  # a tie
@example(1.00390625 + 2**-40)  # just above: fp32 rounds to the tie, bf16 then down
@example(1.00390625 - 2**-40)
@example(-(1.01171875 + 2**-45))
@example(2**-140)
def test_bf16_is_rounded_once(value):
    rounded = to_dtype(np.array([value]), "BF16").astype(np.float64)[0]
    assert rounded in nearest_bf16(value)


def test_two_roundings_would_have_failed():
    """Negative control for the test above: through fp32 the example goes wrong."""
    value = 1.00390625 + 2**-40
    twice = np.float64(value).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert float(twice) not in nearest_bf16(value)


@given(arrays(np.float64, 20, elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_special_values_survive(values):
    for dtype in ("BF16", "F16", "F32", "F64"):
        with np.errstate(over="ignore"):
            rounded = to_dtype(values, dtype)
        assert np.array_equal(np.isnan(rounded.astype(np.float64)), np.isnan(values))


def plan_of(base, *adapters):
    opened = open_base(str(base))
    plan = verify(Plan(opened, tuple(open_adapter(str(a), opened) for a in adapters)))
    return verify(Compose()(plan))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 100, 1 << 19])
def test_weights_equal_an_fp64_replay(tmp_path, monkeypatch, kind, dtype, block):
    """Against PEFT's own live layers, for every element, whatever the block size."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    base = save_base(kind, tmp_path / "base", dtype=dtype)
    adapter = save_adapter(base, tmp_path / "a", use_rslora=True, rank_pattern={"q_proj": 2})
    changes = plan_of(base, adapter).changes()
    layers = dict(live(base, adapter).named_modules())
    assert len(changes) == (28 if kind == "llama" else 16)
    for name, change in changes.items():
        layer = layers["base_model.model." + name.removesuffix(".weight")]
        a, b = layer.lora_A["a0"].weight.double(), layer.lora_B["a0"].weight.double()
        delta = layer.scaling["a0"] * (b @ a)
        exact = layer.base_layer.weight.double() + (delta.T if kind == "gpt2" else delta)
        dtype = change.source.dtype
        ours = merged(change, dtype).astype(np.float64)
        expected = to_dtype(exact.detach().numpy(), dtype).astype(np.float64)
        assert np.array_equal(ours, expected), name


def lower(plan, folder):
    folder.mkdir()
    artifact = lower_merged_safetensors(plan, folder, Silent())
    plan_config = {**plan.base.config, **artifact.config_changes}
    import json

    (folder / "config.json").write_text(json.dumps(plan_config))
    return artifact


def largest_difference(model, folder, ids):
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return (model(ids).logits - ours(ids).logits).abs().max().item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["lm_head", "EMBED"], ["EMBED"]])
def test_logits_equal_peft_also_where_a_tie_breaks(tmp_path, kind, saved):
    """With modules_to_save PEFT keeps head and embedding apart; so does the artifact."""
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    modules = saved and [embedding if m == "EMBED" else m for m in saved]
    base = save_base(kind, tmp_path / "base", shard="60KB")
    adapter = save_adapter(base, tmp_path / "a", modules_to_save=modules)
    plan = plan_of(base, adapter)
    artifact = lower(plan, tmp_path / "out")
    assert (artifact.untied == ("lm_head.weight",)) == bool(saved and kind != "qwen3")
    ids = torch.arange(40).remainder(VOCAB).view(2, 20)
    assert largest_difference(live(base, adapter), tmp_path / "out", ids) < 5e-6


def test_two_adapters_add_up(tmp_path):
    base = save_base("llama", tmp_path / "base")
    first = save_adapter(base, tmp_path / "one", target_modules=["q_proj", "v_proj"])
    second = save_adapter(base, tmp_path / "two", seed=2, r=2, target_modules=["q_proj", "up_proj"])
    plan = plan_of(base, first, second)
    assert plan.history == ("Compose(method='cat')",)
    assert sum(len(d.terms) for d in plan.adapters[0].deltas) == 16 and len(plan.sites()) == 12
    lower(plan, tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    assert largest_difference(live(base, first, second), tmp_path / "out", ids) < 5e-6
    assert largest_difference(live(base, first), tmp_path / "out", ids) > 1e-3  # negative control


def test_untouched_bytes_headers_and_files_are_the_base_own(tmp_path):
    base = save_base("llama", tmp_path / "base", dtype=torch.bfloat16, shard="60KB")
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[1])
    lower(plan_of(base, adapter), tmp_path / "out")
    changed = set()
    for path in base.glob("*.safetensors"):
        ours, theirs = (tmp_path / "out" / path.name).read_bytes(), path.read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert len(ours) == len(theirs) and ours[:length] == theirs[:length]
        old, new = load_file(path), load_file(tmp_path / "out" / path.name)
        changed |= {n for n in old if not torch.equal(old[n], new[n])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
