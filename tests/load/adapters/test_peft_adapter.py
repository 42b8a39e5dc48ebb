"""PEFT folders: every tensor consumed or named, every field obeyed or refused, PEFT's scaling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import AdapterError, SourceError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.plan import Plan
from tests.tiny import live, save_adapter, save_base


@pytest.fixture
def base(tmp_path):
    return save_base("llama", tmp_path / "base")


def edit_config(folder: Path, **changed: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def plan_of(base: Path, adapter: Path) -> Plan:
    opened = open_base(str(base))
    return verify(Plan(opened, (open_adapter(str(adapter), opened),)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
        {"alpha_pattern": {"layers.(0|2).*": 3, "q_proj": 11}, "use_rslora": True},
        # The first match wins, also where a later one is more specific.
        {"rank_pattern": {".*proj": 3, "layers.0.self_attn.q_proj": 5}},
    ],
)
def test_rank_and_scaling_are_those_of_the_live_model(tmp_path, base, options):
    adapter = save_adapter(base, tmp_path / "a", **options)
    plan = plan_of(base, adapter)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in live(base, adapter).named_modules()
        if isinstance(layer, LoraLayer)
    }
    terms = {d.site.path: d.terms[0] for d in plan.adapters[0].deltas}
    assert terms.keys() == layers.keys()
    for path, term in terms.items():
        assert term.rank == layers[path].r["a0"], path
        assert term.scale == layers[path].scaling["a0"], path


def test_modules_to_save_are_replacements(tmp_path, base):
    adapter = save_adapter(base, tmp_path / "a", modules_to_save=["lm_head", "embed_tokens"])
    plan = plan_of(base, adapter)
    saved = {f"{r.site.path}.{r.parameter}" for r in plan.adapters[0].replacements}
    assert saved == {"lm_head.weight", "model.embed_tokens.weight"}
    assert plan.untied() == ("lm_head.weight",)


def rename(old: str, new: str):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename(f"{Q}.lora_A.weight", "q_proj.lora_A.weight"), "starts with 'base_model.model.'"),
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(1)}), r"lora_C.*silence"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}), "lm_head"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"layers.1.self_attn.q_proj: no lora_B"),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 5)}),
            "rank 4 in lora_A and 5 in lora_B",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}),
            "lora_A with 32 columns, expected 64.*another model",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(63, 4)}),
            "lora_B with 63 rows, expected 64",
        ),
        (
            lambda t: [rename(f"{Q}.lora_{x}.weight", f"{Q}x.lora_{x}.weight")(t) for x in "AB"],
            "q_projx: no weight in the base",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, base, edit, message):
    adapter = save_adapter(base, tmp_path / "a")
    edit_tensors(adapter, edit)
    with pytest.raises(AdapterError, match=message):
        plan_of(base, adapter)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "XLORA"}, "peft_type XLORA"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_field_of_next_year": 1}, "a_field_of_next_year = 1"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(tmp_path, base, changed, message):
    adapter = save_adapter(base, tmp_path / "a")
    edit_config(adapter, **changed)
    with pytest.raises(UnsupportedError, match=message):
        plan_of(base, adapter)


HOSTILE = "(([a-z_.0-9]|[a-z_.0-9])+)+[^a-z_.0-9]"  # takes longer than the universe in `re`


def test_a_hostile_pattern_ends_in_time(tmp_path, base):
    adapter = save_adapter(base, tmp_path / "a")
    edit_config(adapter, rank_pattern={HOSTILE: 4})
    with pytest.raises(AdapterError, match="pattern.*name the modules plainly"):
        plan_of(base, adapter)


def test_damaged_folders_are_named(tmp_path, base):
    adapter = save_adapter(base, tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(SourceError, match="cut short"):
        plan_of(base, adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="only adapter_model.bin, a pickle"):
        plan_of(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match="adapter_config.json: not JSON"):
        plan_of(base, adapter)
