"""A front end tried on a replica, in the checking process, whose crash the parent takes for a
verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdaptrixError
from adaptrix_export.graph.frontends.faults import raised_by
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.thresholds import thresholds
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.prove.preflight.replica import save_replica
from adaptrix_export.prove.preflight.rounding import rounding

STEPS = 16
AMPLIFIED = 8  # times its own rounding, a right graph may be off: it rounds in another order
EXACT = 1e-4  # a tenth of what an artifact is allowed: a graph that is right is off by 1e-6


def answer(question: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`passed`, and `why` not: the failing case by name, or the refusal."""
    from adaptrix_export.load.open_base import open_base
    from adaptrix_export.plan import Plan
    from adaptrix_export.targets.merged_onnx import lower_merged_onnx

    base, out = folder / "base", folder / "out"
    out.mkdir()
    save_replica(question["config"], question["task"], base)
    try:
        plan = Plan(open_base(str(base), question["task"]), ())
        artifact = lower_merged_onnx(
            plan, out, Silent(), question["frontend"], question["provider"]
        )
        report = run(
            Job(
                target="onnx", artifact=out, base_folder=base, precision="fp32",
                weights=artifact.weights, task=question["task"], decode_steps=STEPS, threads=1,
                crossings=thresholds(question["config"]),
            ),
            Silent(),
        )  # fmt: skip
    except AdaptrixError as error:
        why = str(error).replace(str(base), "a small replica")
        return {"passed": False, "why": why}
    except (OSError, MemoryError):
        raise  # the machine's fault, not the graph's: no verdict
    except Exception as error:  # what libraries raise shares no class
        if raised_by(error) is None:
            raise  # a fault of ours: no verdict either
        first = str(error).split("\n")[0].replace(str(folder), "")[:200]
        return {"passed": False, "why": f"a small replica does not run: {first}"}
    failed = [case for case in report["cases"] if not (case["passed"] and case["max_abs"] <= EXACT)]
    if failed and all(case["passed"] for case in failed):
        noise = AMPLIFIED * rounding(base, question["task"])
        failed = [case for case in failed if case["max_abs"] > noise]
    if failed:
        most = failed[0]["max_abs"]
        by = "not finite" if most is None else f"off by {most:.2g}"
        return {"passed": False, "why": f"{failed[0]['name']} of a small replica is {by}"}
    if not report["passed"]:
        return {"passed": False, "why": "weights of a small replica are not in their places"}
    return {"passed": True, "why": ""}
