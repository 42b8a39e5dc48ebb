"""The table of families, row by row, against transformers' own classes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from adaptrix_export.arch.families import FAMILIES, family_of
from adaptrix_export.arch.tasks import FEATURES, TASKS
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load import open_base
from tests.tools.zoo_rows import ONE_TASK, Animal

USUAL = {"llama", "qwen3", "phi3", "gpt_oss", "olmo2"}


def known(animal: Animal) -> bool:
    return animal.kind in FAMILIES or animal.kind in USUAL


@pytest.mark.slow
@pytest.mark.parametrize("animal", [a for a in ONE_TASK if known(a)], ids=lambda a: a.kind)
def test_names_are_those_of_transformers(animal):
    config = transformers.AutoConfig.for_model(animal.kind, **animal.config)
    with torch.device("meta"):
        model = getattr(transformers, TASKS[animal.task].auto).from_config(config)
    family = family_of(animal.kind)
    assert family.prefix == model.base_model_prefix
    assert bool(family.tied) == bool(type(config)().to_dict().get("tie_word_embeddings"))
    if animal.task == FEATURES:
        family = family.bare()
    modules = dict(model.named_modules())
    # Marian asks its encoder, whose own module has the shared weights
    assert modules[family.embedding].weight is model.get_input_embeddings().weight
    embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    assert embeddings == set(family.embeddings)
    assert family.conv1d == any(type(m).__name__ == "Conv1D" for m in modules.values())
    if animal.task != FEATURES:
        assert modules[family.head] is model.get_output_embeddings()


def test_stored_names_become_live_ones():
    assert family_of("gpt_neox").live_name("embed_out.weight") == "lm_head.weight"
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert family_of("mixtral").live_name(name) == "model.layers.1.mlp.gate.weight"
    assert family_of("phimoe").live_name(name) == "model.layers.1.mlp.router.weight"
    assert family_of("llama").live_name("model.norm.weight") == "model.norm.weight"


def test_a_layout_that_is_cut_up_on_loading_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nomic_bert"}')
    with pytest.raises(UnsupportedError, match="q, k and v stored in one tensor"):
        open_base(str(tmp_path))
