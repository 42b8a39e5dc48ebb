"""What `redistribute` takes: seconds and peak memory, beside loading the same model.

    make bench        # or: python tests/bench/redistribution.py [--parity full] [--only fit,...]

SmolLM2-135M with the demo's adapter moved onto five layers, fitted on 8,192 tokens, each row a
process of its own, proof included if asked for. The model's own memory is that of a process which
loads base and adapter in float32 with transformers and PEFT and does nothing with them. Exits with
1 where `fit` needs more than 120 seconds or 1.5 times that memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from merge_speed import PREPARE, measured

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
PeftModel.from_pretrained(model, sys.argv[2]).eval()
"""
ADAPTER = Path(__file__).parents[2] / "recipes/adapters/pydoc"
SECONDS, MEMORY = 120.0, 1.5  # of `fit`, on two cores; the second in times the model's own
ROWS = {
    "fit, pydoc": ("fit", "pydoc"),
    "fit, self": ("fit", "self"),
    "distill, pydoc": ("distill", "pydoc"),
}


def redistributed(base: Path, out: Path, strategy: str, text: str, parity: str) -> list[str]:
    command = [sys.executable, "-m", "adaptrix_export", "redistribute", str(base), str(ADAPTER)]
    command += ["--layers", "5", "--strategy", strategy, "--calibration", text]
    return [*command, "--tokens", "8192", "--parity", parity, "--out", str(out)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="fit,distill", help="strategies")
    parser.add_argument("--parity", default="off", help="off, fast or full")
    args = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured([sys.executable, "-c", PREPARE, str(folder), "1"])
        _, own = measured([sys.executable, "-c", LOAD, str(folder / "base"), str(ADAPTER)])
        print(f"the model's own memory: {own:.0f} MB", flush=True)
        print(f"{'strategy, text':20}{'seconds':>9}{'peak MB':>9}{'times own':>11}", flush=True)
        for number, (label, (strategy, text)) in enumerate(ROWS.items()):
            if strategy not in args.only.split(","):
                continue
            out = folder / f"out-{number}"
            command = redistributed(folder / "base", out, strategy, text, args.parity)
            seconds, peak = measured(command)
            figures[label] = {"seconds": seconds, "peak_mb": peak, "times_own": peak / own}
            print(f"{label:20}{seconds:9.1f}{peak:9.0f}{peak / own:11.2f}", flush=True)
    print(json.dumps({"own_mb": own, **figures}), file=sys.stderr)
    within = [
        row["seconds"] <= SECONDS and row["times_own"] <= MEMORY
        for label, row in figures.items()
        if label.startswith("fit")
    ]
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
