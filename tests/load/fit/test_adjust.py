"""Lawful adjustments against live PEFT on the model that the adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from adaptrix_export.errors import AdapterError, InputError, ParityError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.adjust import RENAMES, adjusted
from adaptrix_export.load.fit.invariants import misfits, verify
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.pipeline import build
from adaptrix_export.plan import Plan
from adaptrix_export.recipe import Recipe
from tests.tiny import VOCAB, live, save_adapter, save_base

PREFIX = "base_model.model."
IDS = torch.arange(40).remainder(VOCAB).view(2, 20)
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, rms_norm_eps=1e-6,
)  # fmt: skip


def edit_config(folder: Path, **changed: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {k: v.clone().contiguous() for k, v in edit(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def plan_of(base: Path, adapter: Path) -> Plan:
    opened = open_base(str(base))
    return adjusted(Plan(opened, (open_adapter(str(adapter), opened),)))


def made(base: Path, adapter: Path, out: Path, level: str = "off", **changed: object):
    recipe = Recipe(
        base=str(base), adapters=[str(adapter)], target="safetensors", out=out,
        parity={"level": level}, **changed,
    )  # fmt: skip
    return build(recipe)


def difference(reference: torch.nn.Module, out: Path) -> float:
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        return (reference(IDS).logits - ours(IDS).logits).abs().max().item()


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """One model twice: as phi3, which fuses projections, and as llama, which does not."""
    folder = tmp_path_factory.mktemp("twins")
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(Phi3Config(**SIZES)).eval()
    split = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    state = {}
    for name, value in fused.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", value.split([64, 32, 32]), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            state[name] = value
    split.load_state_dict(state)
    with torch.no_grad():
        assert (fused(IDS).logits - split(IDS).logits).abs().max() < 1e-6
    fused.save_pretrained(folder / "fused")
    split.save_pretrained(folder / "split")
    return folder / "fused", folder / "split"


FUSED = ["qkv_proj", "gate_up_proj", "down_proj"]
SPLIT = ["q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"rank_pattern": {"qkv_proj": 2}, "use_rslora": True}],
)
def test_a_fused_adapter_on_a_split_base(tmp_path, twins, options):
    fused, split = twins
    adapter = save_adapter(fused, tmp_path / "a", target_modules=FUSED, **options)
    plan = verify(plan_of(split, adapter))
    assert [a.kind for a in plan.adjustments] == ["split"] * 4
    assert len(plan.sites()) == 12
    made(split, adapter, tmp_path / "out")
    assert difference(live(fused, adapter), tmp_path / "out") < 5e-6
    plain = AutoModelForCausalLM.from_pretrained(split)  # negative control
    assert difference(plain, tmp_path / "out") > 1e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}],
)
def test_a_split_adapter_on_a_fused_base(tmp_path, twins, options):
    """k_proj is left out, so its rows must not move; q, v, gate and up have scales of their own."""
    fused, split = twins
    adapter = save_adapter(split, tmp_path / "a", target_modules=SPLIT, **options)
    plan = verify(plan_of(fused, adapter))
    assert [a.kind for a in plan.adjustments] == ["stacked"] * 8
    assert "rows 96 to 127 of self_attn.qkv_proj" in " ".join(a.text for a in plan.adjustments)
    outcome = made(fused, adapter, tmp_path / "out", "fast")
    assert difference(live(split, adapter), tmp_path / "out") < 5e-6
    assert outcome.report is not None and outcome.report["replay"]["changed"] == 6
    assert "adapters as adjusted" in outcome.report["oracle"]
    notes = [f"{a['adapter']}: {a['place']}: {a['text']}" for a in outcome.manifest["adjustments"]]
    assert len(notes) == 8 and set(notes) <= set(outcome.notes)
    again = verify_artifact(tmp_path / "out", base=str(fused), adapters=[str(adapter)])
    assert again["parity"]["passed"] and again["parity"]["adjustments"]


@pytest.mark.slow
def test_a_split_build_is_proved(tmp_path, twins):
    adapter = save_adapter(
        twins[0], tmp_path / "a", target_modules=FUSED, rank_pattern={"qkv_proj": 2}
    )
    outcome = made(twins[1], adapter, tmp_path / "out", "fast")
    assert outcome.report is not None and outcome.report["passed"]


def test_what_cannot_be_stacked_exactly_is_refused(tmp_path, twins):
    fused, split = twins
    dora = save_adapter(split, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match="q_proj: no weight in the base.*inside qkv_proj"):
        verify(plan_of(fused, dora))
    wide = save_adapter(split, tmp_path / "wide", target_modules=["q_proj"])
    edit_tensors(wide, lambda t: {k: v[:63] if "lora_B" in k else v for k, v in t.items()})
    with pytest.raises(AdapterError, match="q_proj: no weight in the base"):
        verify(plan_of(fused, wide))
    both = save_adapter(fused, tmp_path / "both", target_modules=["qkv_proj"])
    edit_tensors(both, lambda t: {**t, **load_file(wide / "adapter_model.safetensors")})
    with pytest.raises(AdapterError, match="q_proj: no weight in the base"):
        verify(plan_of(fused, both))


def test_a_base_that_mixes_heads_is_named(tmp_path):
    from transformers import GPTNeoXConfig

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=VOCAB,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "a", target_modules=["query_key_value"])
    edit_tensors(
        adapter, lambda t: {k.replace("query_key_value", "q_proj"): v for k, v in t.items()}
    )
    with pytest.raises(InputError, match="keeps it inside query_key_value"):
        verify(plan_of(tmp_path / "base", adapter))


def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.T if "lora_A" in k or "lora_B" in k else v for k, v in tensors.items()}


def test_transposed_factors_are_turned(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    adapter = save_adapter(base, tmp_path / "a", use_rslora=True)
    reference = live(base, adapter)
    edit_tensors(adapter, turned)
    outcome = made(base, adapter, tmp_path / "out", "fast")
    assert outcome.report is not None and outcome.report["passed"]
    assert {a["kind"] for a in outcome.manifest["adjustments"]} == {"transposed"}
    assert len(outcome.manifest["adjustments"]) == 14
    assert difference(reference, tmp_path / "out") < 5e-6


def test_one_transposed_factor_is_an_error(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "a")
    edit_tensors(adapter, lambda t: {k: v.T if "lora_A" in k else v for k, v in t.items()})
    with pytest.raises(AdapterError, match="rank 96 in lora_A and 4 in lora_B"):
        plan_of(base, adapter)


def test_renames_of_transformers_5(tmp_path):
    """`language_model.model.` became `model.language_model.`; a base that has the latter only."""
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj"])

    def rename(tensors, old, new):
        return {k.replace(f"{PREFIX}{old}", f"{PREFIX}{new}"): v for k, v in tensors.items()}

    weights = load_file(base / "model.safetensors")
    inside = {k.replace("model.", "model.language_model.", 1): v for k, v in weights.items()}
    save_file(inside, base / "model.safetensors", {"format": "pt"})
    edit_tensors(adapter, lambda t: rename(t, "model.", "language_model.model."))
    plan = verify(plan_of(base, adapter))
    (note,) = plan.adapters[0].notes  # the key parser knows this rename
    assert "model.language_model" in note
    paths = [site.path for site in plan.sites()]
    assert paths == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    # an adapter of the text model alone acts on the text half, and the note says so
    edit_tensors(adapter, lambda t: rename(t, "language_model.model.", "model."))
    plan = verify(plan_of(base, adapter))
    assert "model.layers.0.self_attn.q_proj.lora_A.weight is" in plan.adapters[0].notes[0]
    assert [site.path for site in plan.sites()] == paths


def test_renames_are_those_of_transformers():
    """Each row is what transformers' own conversion does to a path."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    path = "layers.0.self_attn.q_proj.weight"
    for old, new, types in RENAMES:
        for kind in types or ("llava",):
            if kind == "gpt_neox":
                kind = "GPTNeoXForCausalLM"
            if kind in ("qwen2_vl", "qwen2_5_vl"):
                kind = "Qwen2VLForConditionalGeneration"
            name = old + (path if old.endswith(".") else ".weight")
            found = name
            for rule in get_checkpoint_conversion_mapping(kind) or []:
                if hasattr(rule, "rename_source_key"):
                    found = rule.rename_source_key(found)[0]
            expected = new + name.removeprefix(old)
            # llava's inner `.model` is dropped by a rule of the inner class
            assert found.replace("language_model.model.", "language_model.") == expected, kind


def tokenizer(folder: Path, tokens: int) -> None:
    words = {f"w{i}": i for i in range(tokens - 1)}
    made_of = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made_of.add_special_tokens(["<pad>"])
    made_of.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [320, 300, 296])
def test_padding_rows_of_the_vocabulary(tmp_path, rows):
    """The adapter's model had `rows` tokens, the base has 300, the tokenizer 290."""
    base = save_base("llama", tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=False)
    other = save_base(
        "llama", tmp_path / "other", num_hidden_layers=1, tie_word_embeddings=False, vocab_size=rows
    )
    kept = load_file(base / "model.safetensors")
    theirs = load_file(other / "model.safetensors")
    for name, value in kept.items():  # the same model but for the padding
        theirs[name][: min(len(value), len(theirs[name]))] = value[: len(theirs[name])]
    save_file(theirs, other / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(
        other, tmp_path / "a", target_modules=["lm_head", "embed_tokens"], init_lora_weights=False
    )
    edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if "base_layer" not in k})
    if rows != 300:
        with pytest.raises(AdapterError, match=f"{rows} (rows|columns), expected 300"):
            verify(plan_of(base, adapter))  # no tokenizer says that it is padding
    tokenizer(base, 290)
    outcome = made(base, adapter, tmp_path / "out", "fast")
    kinds = [a["kind"] for a in outcome.manifest["adjustments"]]
    assert kinds == ["vocabulary"] * (0 if rows == 300 else 2)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reference, ids = live(other, adapter), IDS.remainder(290)
    with torch.no_grad():
        error = (reference(ids).logits[..., :290] - ours(ids).logits[..., :290]).abs().max()
    assert error < 5e-6
    tokenizer(base, 299)
    if rows == 296:  # four of its tokens are real and the adapter has no rows for them
        with pytest.raises(AdapterError, match="296"):
            verify(plan_of(base, adapter))


def misfit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = dict(tensors)
    for key in tensors:
        if "layers.0.mlp.up_proj.lora_B" in key:
            changed[key] = torch.ones(95, 4)
        if "layers.1.self_attn.q_proj" in key:
            changed[key.replace("q_proj", "r_proj")] = changed.pop(key)
    return changed


def test_misfits_are_an_error_or_dropped_and_listed(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    whole = save_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"])
    adapter = save_adapter(base, tmp_path / "a", modules_to_save=["lm_head"])
    edit_tensors(adapter, misfit)
    assert len(list(misfits(plan_of(base, adapter)))) == 2
    with pytest.raises(AdapterError, match="lora_B with 95 rows, expected 96"):
        made(base, adapter, tmp_path / "out")
    outcome = made(base, adapter, tmp_path / "out", "fast", on_mismatch="drop")
    dropped = {a["place"]: a["text"] for a in outcome.manifest["adjustments"]}
    assert set(dropped) == {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.r_proj"}
    assert dropped["model.layers.0.mlp.up_proj"] == (
        "dropped: lora_B with 95 rows, expected 96 as in the base"
    )
    assert sum("dropped" in note for note in outcome.notes) == 2
    assert outcome.report is not None and outcome.report["passed"]
    assert len(outcome.report["adjustments"]) == 2
    assert outcome.report["replay"]["changed"] == 13  # 12 sites that fit, and the head
    reference = live(base, whole)
    for path in ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"):
        layer = reference.get_submodule(f"base_model.model.model.{path}")
        torch.nn.init.zeros_(layer.lora_B["a0"].weight)
    assert difference(reference, tmp_path / "out") < 5e-6
    assert difference(live(base, whole), tmp_path / "out") > 1e-3  # negative control


@pytest.mark.slow
def test_the_proof_sees_a_site_that_was_dropped_too_much(tmp_path, monkeypatch):
    """Negative control: one more site gone than the oracle knows of."""
    from dataclasses import replace

    from adaptrix_export.passes.compose import compose

    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    adapter = save_adapter(base, tmp_path / "a")
    edit_tensors(adapter, misfit)

    def fewer(self, plan):
        first = replace(plan.adapters[0], deltas=plan.adapters[0].deltas[1:])
        return replace(plan, adapters=(first,))

    monkeypatch.setattr(compose.Compose, "__call__", fewer)
    with pytest.raises(ParityError):
        made(base, adapter, tmp_path / "out", "fast", on_mismatch="drop")


def test_dropping_everything_is_an_error(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=1)
    other = save_base("llama", tmp_path / "other", num_hidden_layers=1, hidden_size=32)
    adapter = save_adapter(other, tmp_path / "a")
    with pytest.raises(AdapterError, match="none of its 7 sites fits the base"):
        made(base, adapter, tmp_path / "out", on_mismatch="drop")


def test_values_that_are_no_numbers_are_never_published(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj"])

    def poison(tensors):
        for key, value in tensors.items():
            value.view(-1)[3] = float("nan" if "lora_A" in key else "inf")
        return tensors

    edit_tensors(adapter, poison)
    with pytest.raises(AdapterError, match="q_proj: 1 NaN and 0 infinite values in .*lora_A"):
        made(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
