"""Quantized bases through the whole compiler, and the choice of the weights merged into."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import (
    ParityError,
    RecipeError,
    SourceError,
    UnsupportedError,
)
from adaptrix_export.load import open_base
from adaptrix_export.load.base_weights import note_of, open_bases
from adaptrix_export.load.quantized import bitsandbytes as stored_form
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.oracle import dequantize
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.quantized import save_nf4, train
from tests.tiny import live, save_adapter, save_base


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(plain bf16, NF4, its dequantized values as a plain checkpoint, an adapter trained on it)."""
    folder = tmp_path_factory.mktemp("qlora")
    plain = save_base("llama", folder / "plain", torch.bfloat16)
    quantized, rounded = save_nf4(plain, folder, double=True)
    return plain, quantized, rounded, train(rounded, folder / "adapter")


def recipe(base, adapter, out, target="safetensors", **changed):
    return Recipe(
        base=str(base), adapters=[str(adapter)], target=target, out=out,
        **{"parity": {"level": "fast"}, **changed},
    )  # fmt: skip


def logits(model):
    ids = torch.arange(40)[None] * 7 % 300
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def test_a_trained_qlora_merges_into_what_its_training_saw(tmp_path, models):
    """In float32, so that the merge is not rounded: within 1e-6 of live PEFT on those weights."""
    plain = save_base("llama", tmp_path / "plain")
    quantized, rounded = save_nf4(plain, tmp_path, double=True)
    adapter = train(rounded, tmp_path / "adapter")
    outcome = build(recipe(quantized, adapter, tmp_path / "out"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(live(rounded, adapter))
    assert (logits(merged) - expected).abs().max() <= 1e-6
    assert (logits(live(plain, adapter)) - expected).abs().max() > 1e-2
    assert outcome.report["replay"]["worst"]["ulps"] <= 0.5001


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
def test_both_targets_of_a_quantized_base_are_proved(tmp_path, models, target):
    _, quantized, _, adapter = models
    outcome = build(recipe(quantized, adapter, tmp_path / "out", target))
    assert outcome.report["passed"] and "base_weights" not in outcome.report
    stored = "bitsandbytes nf4 with double quantization in blocks of 64"
    assert outcome.manifest["base_weights"] == {
        "weights": "dequantized", "stored": stored, "simulated": None,
    }  # fmt: skip
    assert outcome.notes[0].endswith(stored)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == {"safetensors": "bfloat16", "onnx": "float32"}[target]
    assert verify_artifact(tmp_path / "out", base=str(quantized), adapters=[str(adapter)])["parity"]
    if target == "safetensors":
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.bfloat16}
        assert not [n for n in weights if not n.endswith((".weight", ".bias"))]


@pytest.mark.slow
def test_gpt2_whose_matrices_are_stored_turned(tmp_path):
    plain = save_base("gpt2", tmp_path / "plain", torch.float16)
    quantized, rounded = save_nf4(plain, tmp_path)
    for name, tensor in open_base(str(rounded)).tensors.items():
        found = open_base(str(quantized)).tensors[name]
        assert np.array_equal(found.read(), tensor.read()), name
    adapter = save_adapter(rounded, tmp_path / "adapter")
    assert build(recipe(quantized, adapter, tmp_path / "out")).report["passed"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_simulated_weights_are_those_of_the_stored_checkpoint(tmp_path, kind):
    plain = save_base(kind, tmp_path / "plain", torch.bfloat16)
    quantized, _ = save_nf4(plain, tmp_path)
    ours, other = open_bases(str(plain), "dequantized", "nf4")
    theirs = open_base(str(quantized)).tensors
    assert ours.tensors.keys() == theirs.keys() and other.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert np.array_equal(ours.tensors[name].read(), tensor.read()), name


@pytest.mark.slow
def test_a_simulated_base_is_proved_and_compared_with_the_original(tmp_path, models):
    plain, _, _, adapter = models
    outcome = build(recipe(plain, adapter, tmp_path / "out", simulate="nf4-double"))
    assert outcome.report["passed"]
    compared = outcome.report["base_weights"]
    assert (compared["merged_into"], compared["compared_with"]) == ("dequantized", "original")
    assert compared["mean_kl"] > 1e-6 and compared["positions"] > 100
    assert outcome.manifest["base_weights"]["simulated"] == "nf4-double"
    again = verify_artifact(tmp_path / "out", base=str(plain), adapters=[str(adapter)])
    assert again["parity"]["base_weights"] == compared


@pytest.mark.slow
def test_the_original_weights_are_merged_into_when_named(tmp_path, models):
    plain, quantized, _, adapter = models
    chosen = dict(base_weights="original", original_base=str(plain))
    outcome = build(recipe(quantized, adapter, tmp_path / "a", **chosen))
    plainly = build(recipe(plain, adapter, tmp_path / "b"))
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert outcome.report["base_weights"]["merged_into"] == "original"
    assert outcome.manifest["base_weights"]["weights"] == "original"
    assert "base_weights" not in plainly.report
    other = build(recipe(quantized, adapter, tmp_path / "c", original_base=str(plain)))
    assert other.report["base_weights"]["merged_into"] == "dequantized"
    assert (tmp_path / "c" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nibbles", "offset"])
def test_a_wrong_reading_of_the_base_fails_parity(tmp_path, models, monkeypatch, fault):
    _, quantized, _, adapter = models
    if fault == "nibbles":
        right = stored_form.unpack
        swapped = lambda packed, *at: right((packed << 4) | (packed >> 4), *at)  # noqa: E731
        monkeypatch.setattr(stored_form, "unpack", swapped)
    else:
        facts = stored_form._nested_facts
        monkeypatch.setattr(stored_form, "_nested_facts", lambda *a: (facts(*a)[0], 0.0))
    with pytest.raises(ParityError, match="weight replay of"):
        build(recipe(quantized, adapter, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out.rejected.json"]


def test_words_that_do_not_go_together_are_named(tmp_path, models):
    plain, quantized, _, _ = models
    other = save_base("llama", tmp_path / "other", hidden_size=32)
    for arguments, found in (
        ((plain, "dequantized"), "base_weights: dequantized, and a plain base, expected simulate"),
        ((plain, "original", None, quantized), "original_base: .*and a plain base"),
        ((quantized, "original"), "base_weights: original, and a quantized base .*nf4"),
        ((quantized, "auto", "nf4"), "simulate: nf4 on a quantized base"),
        ((quantized, "original", None, quantized), "original_base: .*expected an unquantized"),
        ((quantized, "original", None, other), "original_base: .*of shape .*as in"),
    ):
        words = [None if a is None else str(a) for a in arguments]
        with pytest.raises(RecipeError, match=found):
            open_bases(*words)
    with pytest.raises(UnsupportedError, match="simulate: fp4"):
        open_bases(str(plain), "auto", "fp4")


def test_a_layer_that_computes_in_another_dtype_is_noted(models):
    settings = json.loads((models[1] / "config.json").read_text())["quantization_config"]
    for dtype, noted in (("bfloat16", False), ("float32", True)):
        folder = models[1].with_name(f"computing-{dtype}")
        config_with(folder, models[1], {**settings, "bnb_4bit_compute_dtype": dtype})
        base = open_base(str(folder))
        assert base.quantization.endswith(", computing in float32") is noted
        assert ("rounded to the dtype they had" in note_of(base)[0]) is noted


def config_with(folder, plain, settings):
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return str(folder)


@pytest.mark.parametrize("method", ["quark", "unheard-of"])
def test_methods_without_a_row_are_refused_by_name(tmp_path, models, method):
    folder = config_with(tmp_path / "x", models[0], {"quant_method": method})
    with pytest.raises(UnsupportedError, match=f"quantized with {method}.*name the unquantized"):
        open_base(folder)


def test_a_config_that_speaks_of_another_checkpoint_is_refused(tmp_path, models):
    folder = config_with(tmp_path / "x", models[0], {"quant_method": "bitsandbytes"})
    with pytest.raises(SourceError, match="quantization_config .bitsandbytes. over plain weights"):
        open_base(folder)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [[16, 32], [24, 40], None])
def test_fp8_reads_as_transformers_reads_it(tmp_path, models, tile):
    """Against transformers' own `Fp8Dequantize` where the tiles divide the matrix."""
    state = load_file(models[0] / "model.safetensors")
    stored = {}
    for name, tensor in state.items():
        stored[name] = tensor
        if tensor.ndim == 2 and ".layers." in name:
            down, across = tile or tensor.shape
            shape = (-(-tensor.shape[0] // down), -(-tensor.shape[1] // across)) if tile else ()
            stored[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = 0.005 + 0.01 * torch.rand(shape)
    settings = {"quant_method": "fp8", "weight_block_size": tile, "activation_scheme": "dynamic"}
    folder = config_with(tmp_path / "fp8", models[0], settings)
    (tmp_path / "fp8" / "model.safetensors").unlink()
    save_file(stored, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    found = open_base(folder).tensors[name]
    oracle = dequantize._fp8(stored[name], stored[name + "_scale_inv"], settings, torch.bfloat16)
    assert np.array_equal(found.read().astype(np.float32), oracle.float().numpy())
    assert np.array_equal(found.rows(5, 50), found.read()[5:50])
    if tile != [24, 40]:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        theirs = Fp8Dequantize(None)._dequantize_one(
            stored[name], stored[name + "_scale_inv"], torch.bfloat16
        )
        assert torch.equal(theirs, oracle)
    if tile == [24, 40]:
        outcome = build(recipe(folder, models[3], tmp_path / "out"))
        assert outcome.report["passed"] and "rounds activations" in outcome.notes[0]
    del stored[name + "_scale_inv"]
    save_file(stored, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"{name}_scale_inv: missing"):
        open_base(folder)
