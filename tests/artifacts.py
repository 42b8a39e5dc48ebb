"""Tiny packaged artifacts, made by the real lowering, with a real byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.package import write_package
from adaptrix_export.plan import Pass, Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.merged_onnx import lower_merged_onnx
from tests.tiny import VOCAB, save_adapter, save_base

SPECIAL = ["<s>", "</s>", "<pad>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_tokenizer(folder: Path, tokenizer_class: str = "PreTrainedTokenizerFast") -> Tokenizer:
    """A byte-level BPE of 300 tokens, every byte among them, and its files in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": tokenizer_class, "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def save_base_with_tokenizer(kind: str, folder: Path, **changed: object) -> Path:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_base(kind, folder, **{**ids, **changed})
    save_tokenizer(folder)
    return folder


def plan_of(base: Path, *adapters: Path) -> Plan:
    opened = open_base(str(base))
    return Plan(opened, tuple(open_adapter(str(a), opened) for a in adapters))


def packaged(kind: str, folder: Path, *passes: Pass) -> tuple[Artifact, Plan]:
    """A random model of `kind` with a LoRA merged in, as an onnx artifact in `folder`/out."""
    base = save_base_with_tokenizer(kind, folder / "base")
    plan = plan_of(base, save_adapter(base, folder / "adapter"))
    for step in passes:
        plan = step(plan)
    (folder / "out").mkdir()
    artifact = lower_merged_onnx(plan, folder / "out", Silent())
    write_package(artifact, plan)
    return artifact, plan
