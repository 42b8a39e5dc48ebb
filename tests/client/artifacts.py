"""The artifacts that clients are given, and what PyTorch + PEFT says that they must answer.

    python -m tests.client.artifacts FOLDER

Each lies in FOLDER/NAME as `build` writes it, with no option that is not in its recipe here; what
is expected of all of them is in FOLDER/expected.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ViTConfig,
)

from adaptrix_export import build
from adaptrix_export.recipe import Recipe, load_recipe
from tests.artifacts import save_base_with_tokenizer, save_tokenizer
from tests.switchable import LOUD, save_three
from tests.tiny import VOCAB, save_adapter

TEXTS = ["the quick brown fox jumps", "over the lazy dog"]
CHAT = [{"role": "user", "content": "the quick brown fox"}]
SENTENCES = ["How do I open a file?", "The with statement closes it.", "A list of numbers, sorted"]
NEW = 10
OFF = {"level": "off"}  # clients are compared with live PEFT themselves
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2,
}  # fmt: skip
VISION = r".*(query|value|q_proj|v_proj)"  # as releases of transformers name them
SEEDS = {"seq2seq": 3, "classifier": 4, "image": 5}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, Any] = {"texts": TEXTS, "chat": CHAT, "new": NEW, "sentences": SENTENCES}
    sources = folder / "sources"
    for make in (decoder, switchable, sentence, classifier, seq2seq, image):
        expected[make.__name__] = make(sources, folder)
        print(make.__name__, flush=True)
    (folder / "expected.json").write_text(json.dumps(expected))


def made(base: Path, adapter: Path, out: Path, **changed: Any) -> None:
    settings = {"target": "onnx", **changed}
    once(Recipe(base=str(base), adapters=[str(adapter)], out=out, parity=OFF, **settings))


def once(recipe: Recipe) -> None:
    """What is there already stays: clients only read."""
    if not recipe.out.exists():
        build(recipe)


def generated(model: Any, ids: list[int], **settings: Any) -> list[int]:
    """Greedy or beam search as transformers does it, for one row; new tokens alone."""
    row = torch.tensor([ids])
    plain = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad():
        answer = model.generate(row, attention_mask=torch.ones_like(row), **{**plain, **settings})
    tokens: list[int] = answer[0].tolist()
    return tokens if model.config.is_encoder_decoder else tokens[len(ids) :]


def decoder(sources: Path, folder: Path) -> dict[str, Any]:
    """One LoRA on a llama: as a graph, as a checkpoint and as an adapter again."""
    base = save_base_with_tokenizer("llama", sources / "llama", **LOUD)
    adapter = save_adapter(base, sources / "llama-lora", r=8, lora_alpha=32)
    made(base, adapter, folder / "decoder")
    made(base, adapter, folder / "checkpoint", target="safetensors", portable=True)
    made(base, adapter, folder / "adapter", target="peft")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True)
    chat = chat if isinstance(chat, list) else chat["input_ids"]
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "rows": rows,
        "tokens": [generated(live, row) for row in rows],
        "chat": chat,
        "chat_tokens": generated(live, chat),
    }


def switchable(sources: Path, folder: Path) -> dict[str, Any]:
    """Three LoRAs in slots; what each generates, and what the base does."""
    base = sources / "llama"
    adapters = save_three("llama", base, sources / "three")
    named = [{"name": name, "source": str(path)} for name, path in adapters.items()]
    out = folder / "switchable"
    once(Recipe(base=str(base), adapters=named, target="onnx-switchable", out=out, parity=OFF))
    row = AutoTokenizer.from_pretrained(base)(TEXTS[0])["input_ids"]
    tokens = {"": generated(AutoModelForCausalLM.from_pretrained(base).eval(), row)}
    for name, path in adapters.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        tokens[name] = generated(model.eval(), row)
    assert len({tuple(answer) for answer in tokens.values()}) == 4
    return {"row": row, "tokens": tokens}


def sentence(sources: Path, folder: Path) -> dict[str, Any]:
    """A real sentence encoder with the LoRA of recipes/; mean over the tokens, length one."""
    recipe = load_recipe(Path("recipes/minilm-search.yaml"), [
        f"out={folder / 'sentence'}", "parity.level=off", "target=onnx",
    ])  # fmt: skip
    once(recipe)
    from adaptrix_export.load.source import resolve

    base = resolve(recipe.base).folder
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), recipe.adapters[0].source)
    vectors = []
    for text in SENTENCES:
        encoded = AutoTokenizer.from_pretrained(base)([text], return_tensors="pt")
        with torch.no_grad():
            hidden = model.eval()(**encoded).last_hidden_state
        vectors.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0].tolist())
    return {"vectors": vectors}


def adapted(model: Any, folder: Path, task: str, **options: Any) -> Any:
    """A LoRA whose factors are not zero, saved in `folder`; the live model with it."""
    torch.manual_seed(7)
    live = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type=task, **options))
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    live.save_pretrained(folder)
    return live.eval()


def classifier(sources: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(SEEDS["classifier"])
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = BertConfig(**shape, num_attention_heads=4, vocab_size=VOCAB, num_labels=3)
    config.pad_token_id = 2
    base = sources / "bert"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    save_tokenizer(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    live = adapted(model, sources / "bert-lora", "SEQ_CLS", target_modules=["query", "value"])
    made(base, sources / "bert-lora", folder / "classifier", task="text-classification")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        logits = [live(**tokenizer(t, return_tensors="pt")).logits[0].tolist() for t in TEXTS]
    return {"logits": logits}


def seq2seq(sources: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(SEEDS["seq2seq"])
    config = AutoConfig.for_model(
        "bart", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=VOCAB,
        max_position_embeddings=128, decoder_start_token_id=1, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, init_std=0.3,
    )  # fmt: skip
    base = sources / "bart"
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(base)
    save_tokenizer(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    live = adapted(
        model, sources / "bart-lora", "SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"]
    )
    made(base, sources / "bart-lora", folder / "seq2seq")
    row = AutoTokenizer.from_pretrained(base)(TEXTS[0])["input_ids"]
    plain = live.get_base_model()  # the layers of the adapter stay in it
    beams = generated(plain, row, num_beams=3)
    return {"row": row, "tokens": generated(plain, row), "beams": beams}


def image(sources: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(SEEDS["image"])
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = ViTConfig(**shape, num_attention_heads=4, image_size=32, patch_size=8, num_labels=5)
    base = sources / "vit"
    AutoModelForImageClassification.from_config(config).save_pretrained(base)
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = AutoModelForImageClassification.from_pretrained(base)
    live = adapted(model, sources / "vit-lora", None, target_modules=VISION)
    made(base, sources / "vit-lora", folder / "image", task="image-classification")
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        logits = live(pixel_values=torch.from_numpy(pixels)).logits[0].tolist()
    return {"pixels": pixels.tolist(), "logits": logits}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
