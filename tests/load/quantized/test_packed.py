"""GPTQ, AWQ, compressed-tensors, HQQ and MXFP4: read to the last bit, and merged into."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from adaptrix_export.errors import ParityError, SourceError, UnsupportedError
from adaptrix_export.load import open_base
from adaptrix_export.load.quantized import bits as packing
from adaptrix_export.oracle.dequantize import dequantized_state
from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.prove import child, proof
from adaptrix_export.recipe import Recipe
from tests.packed import FORMS, save_packed
from tests.tiny import live, save_adapter, save_base

METHODS = ("gptq 4 bits gptq", "awq", "int4 with zero points", "fp8 by tiles", "hqq 4 bits axis 1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def here(monkeypatch):
    """The proof in this process: another one would import everything again."""
    monkeypatch.setattr(proof, "prove", lambda job, progress, **_: child.run(job, Silent()))


def values_of(tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tensor.read(), np.float64))


def skeleton(folder):
    """The plain model of a packed checkpoint, without its weights."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("form", FORMS)
def test_every_value_is_the_one_that_was_packed(tmp_path, plain, form):
    """By the loader, whole and by rows, and by the oracle, which shares nothing with it."""
    folder, values = save_packed(plain, tmp_path / "packed", form)
    base = open_base(str(folder))
    assert base.tensors.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(values_of(base.tensors[name]), value.double()), name
    name = "model.layers.1.mlp.down_proj.weight"
    rows = np.asarray(base.tensors[name].rows(3, 9), np.float64)
    assert np.array_equal(rows, values[name][3:9].double().numpy())
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    state = dequantized_state(folder, settings, skeleton(folder))
    assert state.keys() == values.keys()
    assert all(torch.equal(state[n].double(), v.double()) for n, v in values.items())


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", METHODS)
def test_an_adapter_merges_into_the_dequantized_weights(tmp_path, plain, form):
    folder, values = save_packed(plain, tmp_path / "packed", form)
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    save_file(
        {n: v.float().contiguous() for n, v in values.items()},
        rounded / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(rounded, tmp_path / "adapter")
    outcome = build(Recipe(base=str(folder), adapters=(str(adapter),), target="safetensors",
                           out=tmp_path / "out"))  # fmt: skip
    assert outcome.report["passed"]
    merged = load_file(tmp_path / "out/model.safetensors")
    model = live(rounded, adapter).merge_and_unload()
    for name, value in model.state_dict().items():
        if name in merged:
            room = value.abs().max() * 2.0**-7  # one rounding to the base's half type
            assert (merged[name].float() - value).abs().max() <= room, name
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.usefixtures("here")
def test_numbers_read_one_place_off_fail_the_proof(tmp_path, plain, monkeypatch):
    """Negative control: the loader's unpacking gives each number but the last to its neighbour."""
    folder, _ = save_packed(plain, tmp_path / "packed", "int4")
    adapter = save_adapter(plain, tmp_path / "adapter")
    right = packing.unpack_words
    monkeypatch.setattr(
        "adaptrix_export.load.quantized.compressed.unpack_words",
        lambda words, bits, count, axis: np.roll(right(words, bits, count, axis), 1, axis),
    )
    with pytest.raises(ParityError, match="weight replay of"):
        build(Recipe(base=str(folder), adapters=(str(adapter),), target="safetensors",
                     out=tmp_path / "out"))  # fmt: skip


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A tiny gpt-oss, its experts in MXFP4, and their values."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=300, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=8, layer_types=["sliding_attention",
        "full_attention"], max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    ))  # fmt: skip
    model.save_pretrained(folder / "plain")
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "plain/model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (count, rows, columns // 32, 16)).to(torch.uint8)
            scales = torch.randint(118, 125, (count, rows, columns // 32)).to(torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            stored[name] = values[name] = tensor.bfloat16()
    (folder / "packed").mkdir()
    save_file(stored, folder / "packed/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain/config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "packed/config.json").write_text(json.dumps(config))
    return folder / "packed", values, model


def test_experts_are_those_that_transformers_reads(experts):
    folder, values, _ = experts
    base = open_base(str(folder))
    for name, value in values.items():
        assert torch.equal(values_of(base.tensors[name]), value.double()), name
    state = dequantized_state(folder, {"quant_method": "mxfp4"}, skeleton(folder))
    assert state.keys() == values.keys()
    assert all(torch.equal(state[n].double(), v.double()) for n, v in values.items())
    assert base.quantization == "mxfp4 E2M1 in blocks of 32"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_adapter_merges_into_experts_of_four_bits(tmp_path, experts):
    from peft import LoraConfig, get_peft_model

    folder, _, model = experts
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    outcome = build(Recipe(base=str(folder), adapters=(str(tmp_path / "adapter"),),
                           target="safetensors", out=tmp_path / "out"))  # fmt: skip
    assert outcome.report["passed"]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq 4 bits gptq", {"dynamic": {"-:.*": {}}}, "modules of other bits"),
        ("gptq 4 bits gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("int4", {"format": "nvfp4-pack-quantized"}, "the format nvfp4-pack-quantized"),
    ],
)
def test_layouts_that_are_not_read_are_refused_by_name(tmp_path, plain, form, change, message):
    folder, _ = save_packed(plain, tmp_path / "packed", form)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=message):
        open_base(str(folder))


@pytest.mark.parametrize(
    ("form", "part"),
    [("gptq 4 bits gptq", "g_idx"), ("awq", "scales"), ("int4", "weight_scale"), ("fp8", "weight"),
     ("hqq 4 bits axis 0", "zero")],
)  # fmt: skip
def test_parts_that_are_missing_or_cut_are_damage(tmp_path, plain, form, part):
    folder, _ = save_packed(plain, tmp_path / "packed", form)
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.endswith(f".q_proj.{part}"))
    kept = {n: t for n, t in whole.items() if n != name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(SourceError, match="q_proj"):
        open_base(str(folder))
    save_file(kept | {name: whole[name][: len(whole[name]) // 2].contiguous()}, file)
    with pytest.raises(SourceError, match="q_proj"):
        open_base(str(folder))
