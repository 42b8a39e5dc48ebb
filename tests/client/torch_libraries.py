"""transformers and PEFT of any release: `python -m tests.client.torch_libraries FOLDER NAME`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.client.rows import Expected, main


def same_tokens(model: Any, asked: Any, new: int) -> None:
    settings = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    for row, tokens in zip(asked["rows"], asked["tokens"], strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            answer = model.eval().generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **settings
            )
        assert answer[0, len(row) :].tolist() == tokens


def checkpoint(folder: Path, expected: Expected) -> str:
    place, asked = folder / "checkpoint", expected["decoder"]
    tokenizer = AutoTokenizer.from_pretrained(place)
    assert [tokenizer(text)["input_ids"] for text in expected["texts"]] == asked["rows"]
    same_tokens(AutoModelForCausalLM.from_pretrained(place), asked, expected["new"])
    return "two prompts, its tokenizer, greedy tokens equal"


def adapter(folder: Path, expected: Expected) -> str:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "sources" / "llama")
    model = PeftModel.from_pretrained(base, folder / "adapter")
    same_tokens(model, expected["decoder"], expected["new"])
    return "two prompts, greedy tokens equal"


ROWS = {"checkpoint": checkpoint, "adapter": adapter}

if __name__ == "__main__":
    sys.exit(main(ROWS, sys.argv[1:]))
