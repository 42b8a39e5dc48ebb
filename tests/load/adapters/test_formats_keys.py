"""Keys of PEFT files in all their forms: parsed, resolved in the base, never guessed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import AdapterError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.adapters.peft_keys import (
    PREFIX,
    canonical,
    module_paths,
    sites_of,
    split_key,
)
from adaptrix_export.load.files.tensors import StoredTensor
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.plan import Plan
from tests.tiny import save_adapter, save_base

MODULES = ("q_proj", "mlp.up_proj", "lora", "weight_norm", "experts.3.w1")
WORD = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True).filter(
    lambda w: w not in ("weight", "bias")
)
# PEFT's ending -> the forms of it, with {n} for the adapter's name.
FORMS = {
    "lora_A.weight": ["lora_A.weight", "lora_A.{n}.weight"],
    "lora_B.weight": ["lora_B.weight", "lora_B.{n}.weight"],
    "lora_B.bias": ["lora_B.bias", "lora_B.{n}.bias"],
    "lora_embedding_A": [
        "lora_embedding_A", "lora_embedding_A.weight", "lora_embedding_A.{n}",
        "lora_embedding_A.{n}.weight",
    ],
    "lora_embedding_B": ["lora_embedding_B", "lora_embedding_B.weight", "lora_embedding_B.{n}"],
    "lora_magnitude_vector": [
        "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.{n}.weight",
    ],
    "token_adapter.trainable_tokens_delta": [
        "token_adapter.trainable_tokens_delta", "token_adapter.trainable_tokens_delta.{n}",
    ],
    "weight": ["weight", "modules_to_save.{n}.weight", "modules_to_save.weight"],
    "base_layer.weight": ["base_layer.weight"],
}  # fmt: skip
PREFIXES = (PREFIX, "", PREFIX * 2, PREFIX * 3)


def base_of(*modules: str) -> SimpleNamespace:
    return SimpleNamespace(tensors=dict.fromkeys(f"{m}.weight" for m in modules), tied={})


def tensors(*keys: str) -> list[StoredTensor]:
    return [StoredTensor(key, "F32", (1,), None, 0) for key in keys]


LLAMA = [f"model.layers.{i}.{m}" for i in range(3) for m in MODULES] + ["lm_head"]


@given(
    st.sampled_from(LLAMA), st.sampled_from(sorted(FORMS)), st.sampled_from(PREFIXES), WORD,
    st.data(),
)  # fmt: skip
def test_every_form_of_a_key_means_the_same(module, ending, prefix, name, data):
    form = data.draw(st.sampled_from(FORMS[ending]))
    key = f"{prefix}{module}.{form.format(n=name)}"
    named, notes = canonical("a", tensors(key), base_of(*LLAMA))
    assert named[0].name == f"{PREFIX}{module}.{ending}"
    assert bool(notes) == (key != named[0].name)
    again, silent = canonical("a", named, base_of(*LLAMA))
    assert again == named and silent == ()


@given(st.sampled_from(LLAMA), st.sampled_from(sorted(FORMS)), st.data())
def test_two_keys_of_one_tensor_are_both_named(module, ending, data):
    forms = [f"{p}{module}.{f.format(n='x')}" for p in PREFIXES for f in FORMS[ending]]
    one, two = data.draw(st.lists(st.sampled_from(forms), min_size=2, max_size=2, unique=True))
    with pytest.raises(AdapterError) as error:
        canonical("a", tensors(one, two), base_of(*LLAMA))
    assert one in str(error.value) and two in str(error.value)


@given(st.lists(WORD, min_size=1, max_size=9).map(".".join))
def test_a_key_of_no_form_is_left_as_it_is(key):
    named, notes = canonical("a", tensors(key), base_of(*LLAMA))
    assert (named[0].name, notes) == (key, ())


@pytest.mark.parametrize(
    ("key", "modules", "found"),
    [
        ("language_model.model.layers.0.q", ["model.language_model.layers.0.q"], 1),
        ("model.language_model.layers.0.q", ["language_model.model.layers.0.q"], 1),
        ("language_model.lm_head", ["lm_head"], 1),
        ("layers.0.q", ["model.layers.0.q"], 1),
        ("h.0.attn", ["transformer.h.0.attn"], 1),
        ("layers.0.q", ["model.layers.0.q", "transformer.layers.0.q"], 2),
        ("layers.0.q", ["layers.10.q"], 0),
        ("layers.1.q", ["layers.13.q", "layers.1.q"], 1),
    ],
)
def test_renames_count_only_where_the_base_has_the_module(key, modules, found):
    assert len(sites_of(tuple(key.split(".")), module_paths(base_of(*modules)))) == found


def test_a_key_of_two_meanings_names_both():
    base = base_of("model.layers.0.q", "transformer.layers.0.q")
    with pytest.raises(AdapterError, match=r"model.layers.0.q or transformer.layers.0.q"):
        canonical("a", tensors("layers.0.q.lora_A.weight"), base)
    # As PEFT writes it, a key has one meaning, whatever else the words could be.
    both = base_of("layers.0.q", "model.layers.0.q")
    named, notes = canonical("a", tensors(f"{PREFIX}layers.0.q.lora_A.weight"), both)
    assert named[0].name == f"{PREFIX}layers.0.q.lora_A.weight" and notes == ()


def test_two_adapters_in_one_file_are_named():
    keys = ["model.layers.0.q_proj.lora_A.one.weight", "model.layers.1.q_proj.lora_A.two.weight"]
    with pytest.raises(AdapterError, match="adapter 'one', beside adapter 'two'"):
        canonical("a", tensors(*keys), base_of(*LLAMA))


def test_endings_are_whole_words():
    assert split_key("a.xlora_A.weight").ending == "weight"
    assert split_key("lora_A.weight") is None or split_key("lora_A.weight").words == ("lora_A",)
    assert split_key("weight") is None


@pytest.mark.parametrize("prefix", PREFIXES[1:])
def test_a_real_adapter_with_other_keys_reads_the_same(tmp_path, prefix):
    base = save_base("llama", tmp_path / "base")
    lora = save_adapter(base, tmp_path / "lora", use_dora=True)
    opened = open_base(str(base))
    first = open_adapter(str(lora), opened)
    assert first.notes == () and not first.foreign
    path = lora / "adapter_model.safetensors"
    renamed = {prefix + k.removeprefix(PREFIX): v for k, v in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})
    second = open_adapter(str(lora), opened)
    verify(Plan(opened, (second,)))
    assert second.foreign and "84 keys are not as PEFT writes them" in second.notes[0]
    assert [d.name for d in first.deltas] == [d.name for d in second.deltas]
