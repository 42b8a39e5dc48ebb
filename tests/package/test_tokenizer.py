"""The tokenizer belongs to the adapter that changed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptrix_export.errors import AdapterError, RecipeError
from adaptrix_export.manage.validate import validate
from adaptrix_export.package.tokenizer import choose_tokenizer
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.artifacts import plan_of, save_base_with_tokenizer

ADDED = ["<|im_start|>", "<|im_end|>", "<|call|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[Path, Path]:
    """A base of 300 tokens, and an adapter trained with 303 of them and a chat template."""
    folder = tmp_path_factory.mktemp("grown")
    base = save_base_with_tokenizer(
        "llama", folder / "base", num_hidden_layers=1, tie_word_embeddings=False
    )
    (base / "preprocessor_config.json").write_text("{}")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(303, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data += 0.05 * torch.randn_like(end.weight)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder / "a", save_embedding_layers=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "a")
    return base, folder / "a"


def chosen(grown, choice="auto"):
    return choose_tokenizer(plan_of(*grown), choice)


def test_the_adapter_s_tokenizer_is_taken_where_it_differs(grown, tmp_path):
    base, adapter = grown
    assert chosen(grown).folder == adapter
    assert chosen(grown).note == "tokenizer and chat template are those of adapter a"
    assert chosen(grown, "base").folder is None
    again = shutil.copytree(adapter, tmp_path / "again")  # the base's own, saved once more
    for path in again.glob("*token*"):
        path.unlink()
    (again / "chat_template.jinja").unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(again)
    assert chosen((base, again)).folder is None
    assert chosen((base, again), "adapter").folder == again


def test_what_does_not_fit_is_named(grown, tmp_path):
    base, adapter = grown
    other = shutil.copytree(adapter, tmp_path / "b")
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["added_tokens"][-1]["id"] = 350
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="token 350, expected ids below 303"):
        chosen((base, other))
    with pytest.raises(RecipeError, match="a different one beside each of a, b"):
        choose_tokenizer(plan_of(base, adapter, other), "auto")
    bare = shutil.copytree(adapter, tmp_path / "c", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(RecipeError, match="no tokenizer beside an adapter"):
        chosen((base, bare), "adapter")
    warnings = {f.check: f for _, f in validate(str(base), [str(bare)]).findings}
    assert warnings["tokenizer"].found == "303 rows in place of the base's 300, and no tokenizer"
    fine = {f.check: f for _, f in validate(str(base), [str(adapter)]).findings}
    assert fine["tokenizer"].severity == "ok" and "of adapter a" in fine["tokenizer"].found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "safetensors"])
def test_an_artifact_speaks_the_adapter_s_template(grown, tmp_path, target):
    base, adapter = grown
    outcome = build(Recipe.model_validate(
        {"base": str(base), "adapters": [str(adapter)], "target": target, "out": tmp_path / "o"}
    ))  # fmt: skip
    assert outcome.report["passed"]
    assert any("of adapter a" in note for note in outcome.notes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    messages = [{"role": "user", "content": "the fox"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nthe fox<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(adapter)(text)["input_ids"]
    assert ids != AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (tmp_path / "o/preprocessor_config.json").is_file()
