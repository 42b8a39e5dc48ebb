"""Where PEFT's own merge is wrong: the live model is right, and so is what is built here."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tiny import live, save_adapter, save_base
from tests.tools.matrix import BUILT, EXACT, IDS, LOUD, Trained, compare

TIED = {"tie_word_embeddings": True}
Q = "q_proj"
# name -> (options of the adapter, how far PEFT's merge is off at least)
DEFECTS = {
    "layer_replication": (dict(layer_replication=[[0, 2], [1, 2]]), 1e-2),
    "LoRA on the tied head": (dict(target_modules=[Q, "lm_head"]), 1e-2),
    "LoRA on the tied embedding": (dict(target_modules=[Q, "embed_tokens"]), 1e-2),
    "LoRA on both ends of a tie": (dict(target_modules=[Q, "embed_tokens", "lm_head"]), 1e-2),
    "ensure_weight_tying": (
        dict(target_modules=[Q, "embed_tokens", "lm_head"], ensure_weight_tying=True), 1e-2,
    ),
}  # fmt: skip


def answer(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.from_numpy(IDS), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("defect", DEFECTS)
def test_peft_merges_wrongly_and_we_do_not(tmp_path, defect):
    options, wrong = DEFECTS[defect]
    base = save_base("llama", tmp_path / "base", **{**LOUD, **TIED})
    adapter = save_adapter(base, tmp_path / "a", **options)
    right = answer(live(base, adapter))
    merged = live(base, adapter).merge_and_unload()
    if not options.get("layer_replication"):  # which transformers cannot even save
        merged.save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert np.abs(answer(merged) - right).max() > wrong
    for target in BUILT:
        error, failed = compare(Trained(base, (adapter,), right, 1.0), target, tmp_path / target)
        assert error <= EXACT and not failed, (target, error, failed)


def fp64_bf16(base, adapter):
    """name -> the fp64 weight of the live model and the nearest bf16, of the three around it."""
    found = {}
    for path, layer in live(base, adapter).named_modules():
        if not hasattr(layer, "lora_A") or "a0" not in layer.lora_A:
            continue
        a, b = layer.lora_A["a0"].weight.double(), layer.lora_B["a0"].weight.double()
        exact = (layer.base_layer.weight.double() + layer.scaling["a0"] * (b @ a)).detach().numpy()
        near = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        bits = near.view(np.uint16).astype(np.int32)
        around = [(bits + d).astype(np.uint16).view(ml_dtypes.bfloat16) for d in (-1, 0, 1)]
        values = np.stack([c.astype(np.float64) for c in around])
        nearest = np.abs(values - exact).argmin(axis=0)  # a tie would be a coincidence
        best = np.take_along_axis(values, nearest[None], axis=0)[0]
        found[path.removeprefix("base_model.model.") + ".weight"] = best
    return found


@pytest.mark.parametrize(("safe", "least"), [(True, 5e-3), (False, 1e-6)])
def test_bf16_is_rounded_once(tmp_path, safe, least):
    """PEFT's safe_merge rounds the delta to bf16, then the sum: many weights are off by one. Its
    other merge rounds the sum to float32 first, which shows next to a tie. None of ours is off."""
    base = save_base("llama", tmp_path / "base", dtype=torch.bfloat16, **LOUD)
    adapter = save_adapter(base, tmp_path / "a")
    expected = fp64_bf16(base, adapter)
    assert len(expected) == 14

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    from peft import PeftModel

    # autocast_adapter_dtype=True, the default, keeps the adapter in float32
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload(safe_merge=safe)
    theirs = {n: p.detach().double().numpy() for n, p in merged.named_parameters()}
    wrong = np.mean([np.mean(theirs[n] != v) for n, v in expected.items()])
    assert wrong > least

    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="safetensors", out=tmp_path / "out",
        parity={"level": "off"},
    )  # fmt: skip
    build(recipe)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in expected.items():
        assert ours[name].dtype == torch.bfloat16
        assert np.array_equal(ours[name].double().numpy(), values), name
