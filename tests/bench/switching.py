"""What adapter slots cost: decode and prefill beside the merged graph, switching, many adapters.

    make bench        # or: python -m tests.bench.switching [--runs 4] [--sessions 4] [--data DIR]

SmolLM2-135M, one thread, float32, every graph through this package's runtime in one process. The
graphs take turns in an order that changes with every step, medians are compared, and time is the
thread's own, so that a busy machine slows all of them alike. Where a session's weights happen to
lie in memory makes up to a tenth of a difference, so all sessions are opened several times; a
second one on the merged graph shows the noise that is left. Adapters are random: rank 16 on all
linear modules, or on layers 7, 15 and 22. `twin` is a session with the graph without slots beside.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.bench.merge_speed import PREPARE, measured
from tests.bench.timed import STEPS, Timed, interleaved

MORE = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
out = Path(sys.argv[1])
every = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
three = {"layers_to_transform": [7, 15, 22], "target_modules": every}
rows = [("second", 1, {}), ("third", 2, {}), ("three", 3, three)]
# 1 MB of factors: rank 16 on the attention of 8 layers, as a small adapter has them
small = {"layers_to_transform": list(range(0, 24, 3)), "target_modules": ["q_proj", "o_proj"]}
rows += [("small", 4, small)]
for name, seed, options in rows:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **options}
    peft = get_peft_model(model, LoraConfig(**settings))
    for key, value in peft.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.02)
    peft.save_pretrained(out / name)
"""
PROMPT, ROWS = 128, 8


def prepared(folder: Path) -> None:
    if not (folder / "base").is_dir():
        measured([sys.executable, "-c", PREPARE, str(folder), "1"])
    if not (folder / "small").is_dir():
        measured([sys.executable, "-c", MORE, str(folder)])


def built(folder: Path, name: str, target: str, adapters: list[str], rows: bool = False) -> Path:
    from adaptrix_export import Recipe, build

    out = folder / name
    if not out.is_dir():
        sources = [str(folder / a) for a in adapters]
        build(Recipe(base=str(folder / "base"), adapters=sources, target=target, out=out,
                     rows=rows, parity={"level": "off"}))  # fmt: skip
    return out


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        cells = "  ".join(f"{key} {value:g}" for key, value in row.items())
        print(f"  {name:28}{cells}", flush=True)


def switching(session: Any, names: list[str]) -> dict[str, float]:
    """`use()` by name, and of a mix the first time and after that."""
    times = []
    for turn in range(200):
        begin = time.perf_counter()
        session.use(names[turn % len(names)])
        times.append(time.perf_counter() - begin)
    mix = dict.fromkeys(names, 0.5)
    mixes = []
    for _ in range(2):
        begin = time.perf_counter()
        session.use(mix)
        mixes.append(time.perf_counter() - begin)
    return {
        "median_ms": round(1e3 * statistics.median(times), 5),
        "max_ms": round(1e3 * max(times), 4),
        "first_mix_ms": round(1e3 * mixes[0], 3),
        "same_mix_ms": round(1e3 * mixes[1], 5),
    }


def many(out: Path) -> dict[str, dict[str, float]]:
    """Load time and memory as adapters are added, each from a file of its own.

    To be run in a process that has done nothing else: what other sessions give back would be
    taken off the memory.
    """
    from adaptrix_export.runtime import Session

    session = Session(out, threads=1)
    source = out / "adapters" / "small.onnx_adapter"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    values = manifest["switchable"]["adapters"]["small"]["parameters"]
    process, found = psutil.Process(), {}
    with tempfile.TemporaryDirectory() as scratch:
        gc.collect()
        before, seconds = process.memory_info().rss, 0.0
        for number in range(1, 33):
            copy = Path(scratch) / f"a{number}.onnx_adapter"
            copy.write_bytes(source.read_bytes())
            begin = time.perf_counter()
            session.load_adapter(copy)
            seconds += time.perf_counter() - begin
            if number in (1, 8, 16, 32):
                grown = process.memory_info().rss - before
                found[f"{number} adapters"] = {
                    "parameters_mb": round(4 * values / 1e6, 3),
                    "file_mb": round(source.stat().st_size / 1e6, 3),
                    "load_ms_each": round(1e3 * seconds / number, 3),
                    "memory_mb_each": round(grown / 1e6 / number, 3),
                }
    return found


def in_a_process(out: Path) -> dict[str, dict[str, float]]:
    """`many` on its own."""
    code = "import json, sys; from pathlib import Path; from tests.bench.switching import many; "
    code += "print(json.dumps(many(Path(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out.resolve())], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="with each session")
    parser.add_argument("--sessions", type=int, default=4, help="of each graph")
    parser.add_argument("--data", type=Path, help="keep models and artifacts here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or Path(scratch)
        prepared(folder)
        merged = built(folder, "merged", "onnx", ["adapter"])
        slots = built(folder, "slots", "onnx-switchable", ["adapter", "second", "third"])
        three = built(folder, "slots3", "onnx-switchable", ["three"])
        rows = built(folder, "rows", "onnx-switchable", ["adapter", "second", "third"], rows=True)
        small = built(folder, "slots-small", "onnx-switchable", ["small"])
        from adaptrix_export.runtime import Session

        cases = {
            "merged": Timed(merged),
            "merged, a second time": Timed(merged),  # what is noise
            "slots, base alone": Timed(slots),
            "slots, base alone, twin": Timed(slots, twin=True),
            "slots, rank 16 everywhere": Timed(slots, "adapter"),
            "slots on 3 layers, rank 16": Timed(three, "three"),
        }
        result: dict[str, Any] = {"cost": interleaved(cases, args.sessions, args.runs, PROMPT)}
        show(f"against the merged graph, {PROMPT} tokens, then {STEPS} steps", result["cost"])
        result["use"] = switching(Session(slots, threads=1), ["adapter", "second"])
        show("use()", {"by name": result["use"]})
        names = ["adapter", "second", "third"]
        cases = {
            "slots, one adapter": Timed(slots, "adapter", ROWS),
            "rows, one adapter": Timed(rows, "adapter", ROWS),
            "rows, three adapters": Timed(rows, [names[row % 3] for row in range(ROWS)], ROWS),
        }
        runs = max(2, args.runs // 2)
        result["rows"] = interleaved(cases, args.sessions, runs, 16)
        show(f"a batch of {ROWS}, 16 tokens, then {STEPS} steps", result["rows"])
        result["many"] = in_a_process(small)
        show("many small adapters on one base", result["many"])
    print(json.dumps(result), file=sys.stderr)


if __name__ == "__main__":
    main()
