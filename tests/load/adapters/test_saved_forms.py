"""Adapters as people save them: names of wrappers, sub-folders, shards, ZeRO-3, one LoRA an expert,
the text half of a vision-language model. Each is read as the plain one, or named with a remedy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import AdapterError, InputError, SourceError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.adapters.wrappers import WRAPPERS, strip_wrappers
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.merge.merge import merged
from adaptrix_export.plan import Adapter, Plan
from tests.tiny import save_adapter, save_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("saved")
    base = save_base("llama", folder / "base", num_hidden_layers=2)
    return base, save_adapter(base, folder / "plain", target_modules=["q_proj", "v_proj"])


def renamed(adapter: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(adapter, folder)
    tensors = {rename(key): value for key, value in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def values(base: Path, adapter: Path) -> tuple[dict[str, bytes], Adapter]:
    """The bytes of every term by the place it is added to, checked against the base."""
    opened = open_base(str(base))
    read = open_adapter(str(adapter), opened)
    verify(Plan(opened, (read,)))
    return {
        delta.name: b"".join(t.read().tobytes() for term in delta.terms for t in term.tensors)
        for delta in read.deltas
    }, read


FORMS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "fsdp": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
    "checkpointed": lambda key: key.replace(".q_proj", "._checkpoint_wrapped_module.q_proj"),
    "ddp": lambda key: f"module.{key}",
    "ddp inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "all at once": lambda key: "module._orig_mod." + key.replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ).replace(".weight", ".default.weight"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_are_stripped_wherever_they_are(saved, tmp_path, form):
    base, adapter = saved
    plain, _ = values(base, adapter)
    found, read = values(base, renamed(adapter, tmp_path / "a", FORMS[form]))
    assert found == plain and len(plain) == 4
    assert any("wrappers left were stripped from" in note for note in read.notes)
    assert read.foreign  # PEFT would drop them in silence


@given(
    st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4), st.lists(st.integers(0, 5), max_size=4)
)
def test_nothing_else_is_stripped(words, places):
    key = "base_model.model.layers.3.q_proj.lora_A.weight".split(".")
    wrapped = list(key)
    for word, place in zip(words, places, strict=False):
        wrapped.insert(place, word)
    kept, stripped = strip_wrappers(".".join(wrapped), lambda name: True)
    assert kept.split(".") == key
    assert len(stripped) == len(wrapped) - len(key)


def test_a_module_called_module_keeps_its_name():
    known = {"layers.0.module.q.weight"}
    assert strip_wrappers("layers.0.module.q.weight", known.__contains__) == (min(known), ())
    assert strip_wrappers("module.layers.0.module.q.weight", lambda key: False)[1] == ()


def test_another_tuner_loses_its_wrappers_too(saved, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _ = saved
    settings = IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "plain")
    wrapped = renamed(tmp_path / "plain", tmp_path / "wrapped", FORMS["compiled layers"])
    plain, _ = values(base, tmp_path / "plain")
    found, read = values(base, wrapped)
    assert found == plain
    assert (
        read.peft_copy is not None
        and load_file(read.peft_copy / WEIGHTS).keys()
        == load_file(tmp_path / "plain" / WEIGHTS).keys()
    )


def test_the_only_sub_folder_with_an_adapter_is_read(saved, tmp_path):
    base, adapter = saved
    shutil.copytree(adapter, tmp_path / "run/sql")
    found, read = values(base, tmp_path / "run")
    assert found == values(base, adapter)[0]
    assert read.notes == ("the adapter is in the sub-folder sql",)
    shutil.copytree(adapter, tmp_path / "run/checkpoint-90")
    shutil.copytree(adapter, tmp_path / "run/checkpoint-200")
    with pytest.raises(SourceError, match=r"checkpoint-200, checkpoint-90, sql.*checkpoint-200$"):
        values(base, tmp_path / "run")


def shard(adapter: Path, folder: Path) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / WEIGHTS)
    (folder / WEIGHTS).unlink()
    listed = {}
    for i, keys in enumerate((sorted(tensors)[:3], sorted(tensors)[3:])):
        name = f"adapter_model-0000{i + 1}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name)
        listed.update(dict.fromkeys(keys, name))
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def test_shards_with_an_index_are_read_whole(saved, tmp_path):
    base, adapter = saved
    folder = shard(adapter, tmp_path / "a")
    found, read = values(base, folder)
    assert found == values(base, adapter)[0]
    assert read.foreign and len(read.files) == 3
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no shard 'adapter_model-00002"):
        values(base, folder)
    save_file({"other": torch.ones(1)}, folder / "adapter_model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"index and shards disagree"):
        values(base, folder)


@pytest.mark.parametrize("part", ["", "layers.1"])
def test_zero3_is_named(saved, tmp_path, part):
    base, adapter = saved
    folder = shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(adapter / WEIGHTS)
    save_file(
        {key: torch.zeros(0) if part in key else value for key, value in tensors.items()},
        folder / WEIGHTS,
    )
    count = 3 if part else 7
    message = rf"shape \[0\], like {count} more of 8.*ZeRO-3.*stage3_gather_16bit"
    with pytest.raises(AdapterError, match=message):
        values(base, folder)


def test_rows_of_added_tokens_go_behind_the_base_s(saved, tmp_path):
    base, adapter = saved
    folder = shutil.copytree(adapter, tmp_path / "a")
    rows = torch.randn(3, 64)
    save_file({"input_embeddings": rows}, folder / "new_embeddings.safetensors")
    opened = open_base(str(base))
    plan = verify(Plan(opened, (open_adapter(str(folder), opened),)))
    change = plan.changes()["model.embed_tokens.weight"]
    whole = merged(change, "F32")
    before = opened.tensors["model.embed_tokens.weight"].read()
    assert np.array_equal(whole, np.concatenate([before, rows.numpy()]))
    save_file({"input_embeddings": rows[:, :5].clone()}, folder / "new_embeddings.safetensors")
    with pytest.raises(AdapterError, match=r"new_embeddings.safetensors: input_embeddings"):
        open_adapter(str(folder), opened)


def _full(saved, folder):
    return saved[0], saved[0]


def _no_config(saved, folder):
    shutil.copytree(saved[1], folder)
    (folder / CONFIG).unlink()
    return saved[0], folder


def _empty_config(saved, folder):
    shutil.copytree(saved[1], folder)
    (folder / CONFIG).write_text("{}")
    return saved[0], folder


def _adapter_as_base(saved, folder):
    return saved[1], saved[1]


def _unmerged_base(saved, folder):
    shutil.copytree(saved[0], folder)
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors[f"{name}.lora_A.default.weight"] = torch.ones(4, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, saved[1]


def _hub_id(saved, folder):
    return "meta-llama/Llama-3.2-1B", saved[1]


def _newer_peft(saved, folder):
    shutil.copytree(saved[1], folder)
    config = json.loads((folder / CONFIG).read_text())
    config.update(use_next_lora=True, peft_version="0.99.0")
    (folder / CONFIG).write_text(json.dumps(config))
    return saved[0], folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_full, r"a whole model \(config\.json, model\.safetensors\).*name it as the base"),
        (_no_config, r"adapter_model\.safetensors and no adapter_config\.json.*save_pretrained"),
        (_empty_config, r"adapter_config\.json: an empty object.*save_pretrained"),
        (_adapter_as_base, r"an adapter's folder.*trained on.*name the model that the adapter"),
        (_unmerged_base, r"an unmerged model: 2 tensors of PEFT's layers.*merge_and_unload"),
        (_hub_id, r"no such folder.*is written hf:meta-llama/Llama-3\.2-1B"),
        (_newer_peft, r"use_next_lora = True, a field that is not known.*PEFT 0\.99\.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_it_is_and_what_to_do(saved, tmp_path, make, message):
    base, adapter = make(saved, tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        open_adapter(str(adapter), open_base(str(base)))
    assert caught.value.found and caught.value.remedy


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> tuple[Path, Path]:
    """A mixture, and an adapter with a LoRA on three of four experts' matrices, transformers 4's
    names."""
    folder = tmp_path_factory.mktemp("moe")
    base = save_base("mixtral", folder / "base", num_hidden_layers=1)
    adapter = save_adapter(base, folder / "adapter", target_modules=["q_proj"])
    tensors, draw = load_file(adapter / WEIGHTS), torch.Generator().manual_seed(0)
    sizes = {"w1": (64, 96), "w3": (64, 96), "w2": (96, 64)}
    for expert in (0, 1, 3):
        for part, (inputs, outputs) in sizes.items():
            place = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{part}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, inputs, generator=draw)
            tensors[f"{place}.lora_B.weight"] = torch.randn(outputs, 4, generator=draw)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    return base, adapter


def test_a_lora_for_each_expert_is_read_onto_the_stacked_parameters(moe):
    base, adapter = moe
    opened = open_base(str(base))
    read = open_adapter(str(adapter), opened)
    plan = verify(Plan(opened, (read,)))
    tensors = load_file(adapter / WEIGHTS)

    def product(expert: int, part: str) -> np.ndarray:
        place = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{part}"
        a, b = (tensors[f"{place}.lora_{x}.weight"].double().numpy() for x in "AB")
        return 7 / 4 * (b @ a)

    for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        full = f"model.layers.0.mlp.experts.{name}"
        before = opened.tensors[full].read().astype(np.float64)
        wanted = before.copy()
        for expert in (0, 1, 3):
            wanted[expert] += np.concatenate([product(expert, part) for part in parts])
        assert np.array_equal(merged(plan.changes()[full], "F32"), wanted.astype(np.float32))
    assert read.notes[-1].startswith("9 LoRAs of single experts")


def test_experts_that_do_not_fit_are_named(moe, tmp_path):
    base, adapter = moe
    opened = open_base(str(base))

    def edited(name: str, edit) -> Path:
        folder = shutil.copytree(adapter, tmp_path / name)
        tensors = load_file(adapter / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    place = "base_model.model.model.layers.0.block_sparse_moe.experts"

    def beyond(tensors):
        for x in "AB":
            tensors[f"{place}.7.w1.lora_{x}.weight"] = tensors[f"{place}.0.w1.lora_{x}.weight"] + 1

    def narrow(tensors):
        key = f"{place}.0.w1.lora_A.weight"
        tensors[key] = tensors[key][:, :10].clone()

    def alone(tensors):
        del tensors[f"{place}.0.w1.lora_B.weight"]

    for edit, kind, message in (
        (beyond, AdapterError, "expert 7, expected 4 experts"),
        (narrow, AdapterError, r"factors of shape \[4, 10\]"),
        (alone, UnsupportedError, "parts a, expected lora_A and lora_B"),
    ):
        with pytest.raises(kind, match=message):
            open_adapter(str(edited(edit.__name__, edit)), opened)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
def test_experts_are_proved_against_live_peft(moe, tmp_path, target):
    from adaptrix_export.pipeline import build
    from adaptrix_export.recipe import Recipe

    base, adapter = moe
    outcome = build(Recipe.model_validate(
        {"base": str(base), "adapters": [str(adapter)], "target": target, "out": tmp_path / "o"}
    ))  # fmt: skip
    assert outcome.report["passed"] and "converted to PEFT form" in outcome.report["oracle"]


TEXT_HALF: dict[str, tuple[str, str]] = {
    "as transformers 5 names it": ("model.layers.", "model.language_model.layers."),
    "as transformers 4 named it": ("model.layers.", "language_model.model.layers."),
    "of Idefics": ("model.layers.", "model.text_model.layers."),
}


@pytest.mark.parametrize("form", TEXT_HALF)
def test_the_text_half_of_a_larger_model_is_read_on_its_text_model(saved, tmp_path, form):
    base, adapter = saved
    old, new = TEXT_HALF[form]
    folder = renamed(adapter, tmp_path / "a", lambda key: key.replace(f".{old}", f".{new}"))
    found, read = values(base, folder)
    assert found == values(base, adapter)[0]
    assert set(read.written) == {delta.site.path for delta in read.deltas}
    tensors = load_file(folder / WEIGHTS)
    for x in "AB":
        shape = (4, 32) if x == "A" else (32, 4)
        key = f"base_model.model.model.vision_tower.layers.0.q_proj.lora_{x}.weight"
        tensors[key] = torch.randn(shape)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    message = r"vision_tower\.layers\.0\.q_proj.*no vision_tower.*--on-mismatch drop"
    with pytest.raises(AdapterError, match=message):
        values(base, folder)
