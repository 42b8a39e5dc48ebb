"""Bases: names, shards, ties, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load import open_base
from adaptrix_export.plan import Site
from tests.tiny import save_base


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_names_and_shapes_are_those_of_the_model(tmp_path, kind):
    folder = save_base(kind, tmp_path, shard="100KB")
    base = open_base(str(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(base.files) > 3
    assert {n: t.shape for n, t in base.tensors.items()} == {
        n: tuple(t.shape) for n, t in expected.items() if n not in base.tied
    }
    assert base.tied.keys() == ({"lm_head.weight"} if kind != "qwen3" else set())
    assert base.architecture.stacks[0].count == 4
    assert base.architecture.hidden_size == 64
    assert base.architecture.key_value_heads == (4 if kind == "gpt2" else 2)


def test_a_checkpoint_of_the_bare_model_gets_its_prefix(tmp_path):
    """GPT-2's checkpoint on the hub says `h.0.attn...`, the model `transformer.h.0.attn...`."""
    folder = save_base("gpt2", tmp_path)
    stored = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    base = open_base(str(folder))
    assert base.tensors["transformer.h.0.attn.c_attn.weight"].name == "h.0.attn.c_attn.weight"
    assert base.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_sites_are_parsed_once_and_layers_are_numbers(tmp_path):
    architecture = open_base(str(save_base("gpt2", tmp_path))).architecture
    assert architecture.site_of("transformer.h.3.mlp.c_fc") == Site("transformer.h", 3, "mlp.c_fc")
    assert architecture.is_transposed(architecture.site_of("transformer.h.3.mlp.c_fc"))
    assert not architecture.is_transposed(architecture.site_of("lm_head"))
    sites = [Site("h", 10, "a"), Site("h", 9, "a"), Site("", None, "lm_head")]
    assert sorted(sites, key=lambda s: s.order) == sites[::-1]


def test_index_and_shards_must_agree(tmp_path):
    folder = save_base("llama", tmp_path, shard="100KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = {**index["weight_map"], "model.norm.weight": "model-00001-of-00006.safetensors"}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    with pytest.raises(SourceError, match="model.norm.weight: in model-.*by the index"):
        open_base(str(folder))
    path.write_text(json.dumps({**index, "weight_map": {"x": "../../x.safetensors"}}))
    with pytest.raises(SourceError, match="no shard '../../x.safetensors'"):
        open_base(str(folder))


def test_what_is_refused_is_named(tmp_path):
    folder = save_base("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "quark"}})
    )
    with pytest.raises(UnsupportedError, match="quantized with quark"):
        open_base(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights"):
        open_base(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="only pytorch_model.bin.*pickle"):
        open_base(str(folder))
