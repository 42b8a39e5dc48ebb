"""Mixtures of experts: stacked as the live model has them, written as the checkpoint has them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import AdapterError, SourceError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.quantized.experts import Stacked
from adaptrix_export.merge.merge import merged
from adaptrix_export.plan import Experts, Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets.merged_safetensors import lower_merged_safetensors
from tests.tiny import save_base

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def save_expert_adapter(base, folder, targets=(UP, DOWN), **options):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = dict(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=list(targets))
    peft = get_peft_model(model, LoraConfig(**{**settings, **options}))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(folder)
    return folder


def plan_of(base, adapter):
    opened = open_base(str(base))
    return verify(Plan(opened, (open_adapter(str(adapter), opened),)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_names_and_values_are_those_of_the_live_model(tmp_path, kind):
    folder = save_base(kind, tmp_path, num_hidden_layers=2, shard="60KB")
    base = open_base(str(folder))
    live = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert set(base.tensors) == set(live)
    for name, tensor in base.tensors.items():
        assert tensor.shape == tuple(live[name].shape)
        assert np.array_equal(tensor.read(), live[name].detach().numpy()), name
    stacked = base.tensors[f"model.layers.1.{UP}"]
    assert isinstance(stacked, Stacked) and stacked.shape[0] == 4
    assert np.array_equal(stacked.rows(1, 3), stacked.read()[1:3])
    assert [piece[1:] for piece in stacked.pieces()][:3] == [
        (0, 0, stacked.shape[1] // 2), (0, stacked.shape[1] // 2, stacked.shape[1]),
        (1, 0, stacked.shape[1] // 2),
    ]  # fmt: skip


def test_a_checkpoint_keeps_its_names_files_and_untouched_bytes(tmp_path):
    base = save_base("mixtral", tmp_path / "base", num_hidden_layers=2, shard="60KB")
    adapter = save_expert_adapter(base, tmp_path / "a", (DOWN,), layers_to_transform=[1])
    (tmp_path / "out").mkdir()
    plan = plan_of(base, adapter)
    lower_merged_safetensors(plan, tmp_path / "out", Silent())
    changed = set()
    for path in base.glob("*.safetensors"):
        ours, theirs = (tmp_path / "out" / path.name).read_bytes(), path.read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert ours[:length] == theirs[:length] and len(ours) == len(theirs)
        old, new = load_file(path), load_file(tmp_path / "out" / path.name)
        changed |= {n for n in old if not torch.equal(old[n], new[n])}
    experts = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight" for i in (0, 1) for e in range(4)
    }
    # PEFT's layers_to_transform is for modules: parameters are targeted in every layer
    assert changed == experts | {"model.layers.1.self_attn.q_proj.weight"}


def test_a_term_is_the_live_delta_expert_by_expert(tmp_path):
    """A is expert-slowest, B expert-fastest: the other layout has the same shapes, other values."""
    base = save_base("mixtral", tmp_path / "base", num_hidden_layers=1)
    adapter = save_expert_adapter(base, tmp_path / "a")
    plan = plan_of(base, adapter)
    from tests.tiny import live

    layer = live(base, adapter).base_model.model.model.layers[0].mlp.experts
    wrappers = {layer.parameter_name: layer, layer.base_layer.parameter_name: layer.base_layer}
    for name, wrapper in wrappers.items():
        change = plan.changes()[f"model.layers.0.mlp.experts.{name}"]
        exact = wrapper.get_param().double() + wrapper.get_delta_weight("a0").double()
        assert np.abs(merged(change, "F64") - exact.detach().numpy()).max() < 1e-8
        (term,) = change.terms
        assert isinstance(term, Experts) and (term.rank, term.experts) == (3, 4)
        a, b = term.a.read(), term.b.read()
        wrong = np.einsum("oer,eri->eoi", b.reshape(len(b), 4, 3), a.reshape(4, 3, -1))
        assert (
            np.abs(term.scale * wrong - (merged(change, "F64") - change.source.read())).max() > 1e-3
        )
        whole = merged(change, "F32")
        assert np.array_equal(merged(change, "F32", 1, 3), whole[1:3])


def test_missing_or_unequal_experts_are_named(tmp_path):
    base = save_base("mixtral", tmp_path, num_hidden_layers=1)
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    kept = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match="no w3 of expert 2"):
        open_base(str(base))
    save_file({**tensors, name: kept.half()}, file, {"format": "pt"})
    with pytest.raises(SourceError, match="experts of different shapes or dtypes"):
        open_base(str(base))


def test_what_the_config_says_must_be_in_the_file(tmp_path):
    base = save_base("mixtral", tmp_path / "base", num_hidden_layers=1)
    adapter = save_expert_adapter(base, tmp_path / "a")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_parameters": [UP]}))
    with pytest.raises(AdapterError, match="2 pairs of factors, expected one for each of gate_up"):
        plan_of(base, adapter)
    path.write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(AdapterError, match="experts.*factors of shape.*expected rank 2 for each"):
        plan_of(base, adapter)
    path.write_text(json.dumps({**config, "target_parameters": []}))
    with pytest.raises((AdapterError, UnsupportedError), match="experts"):
        plan_of(base, adapter)
