"""The tiny inputs that everything under `tests/trust` damages: made once, copied for each try."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import save_adapter, save_base


@dataclass(frozen=True)
class Inputs:
    """A two-layer LLaMA with a tokenizer, a LoRA on it, and an artifact of both, if one is made."""

    base: Path
    adapter: Path
    artifact: Path | None = None


def make_inputs(folder: Path) -> Inputs:
    base = save_base("llama", folder / "base", num_hidden_layers=2)
    adapter = save_adapter(base, folder / "adapter", target_modules=["q_proj", "v_proj"])
    save_tokenizer(base)
    return Inputs(base, adapter)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of the bytes, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)


def copied(source: Path, target: Path) -> Path:
    """A copy whose files share their bytes with the original until one is replaced."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Put changed bytes in place of a file that may be linked elsewhere."""
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
