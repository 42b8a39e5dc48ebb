"""(adapter kind) x (base kind) x (target): exact against the live PEFT model, or refused by name.

    python -m tests.tools.matrix [--only KIND] [--row TEXT] [--jobs N] [--json FILE]

Each cell is a real lowering of a tiny random base with an adapter whose trained parameters were
all moved. It is `exact` when the artifact, in its runtime, answers within 1e-5 of the PEFT model
that was trained (unmerged, in float32) and when every tensor replays; `refused` when the compiler,
or the oracle before it compares anything, said by name why not; anything else is WRONG. `-` stands
where PEFT has no such adapter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adaptrix_export.arch.tasks import FEATURES, GENERATION, TASKS
from adaptrix_export.errors import InputError, ParityError
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.peft_folders import oracle_folders
from adaptrix_export.oracle.reference import Reference, encode
from adaptrix_export.package import write_package
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.from_recipe import passes_of
from adaptrix_export.pipeline import open_plan, run_passes
from adaptrix_export.progress import Silent
from adaptrix_export.prove.open_subject import open_subject
from adaptrix_export.prove.proof import ProofRequest
from adaptrix_export.prove.replay import replay
from adaptrix_export.recipe import Recipe
from adaptrix_export.targets import TARGETS, open_stored
from tests.tiny import VOCAB, save_base
from tests.tools.matrix_rows import KINDS, NAMES, ROWS, Row, named

BUILT = ("safetensors", "onnx")
EXACT = 1e-5  # on logits in float32
EFFECT = 1e-4  # an adapter that does less proves nothing
LABELS = 5
IDS = np.arange(7, 7 + 4 * 24, 4, dtype=np.int64)[None] % (VOCAB - 20)
LOUD = {"initializer_range": 0.08, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Cell:
    """`status` is exact, refused, wrong or none; `text` what is printed, `detail` why."""

    row: str
    kind: str
    target: str
    status: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Trained:
    """A base and adapters on disk, and what the live model that they were saved from answers."""

    base: Path
    adapters: tuple[Path, ...]
    logits: np.ndarray
    effect: float


class Impossible(Exception):
    """PEFT or transformers has no such adapter for this base."""


def cells_of(row: Row, kind: str) -> list[Cell]:
    """Both targets of one row on one base."""
    if kind not in row.kinds:
        return [Cell(row.name, kind, target, "none", "-", "not for this base") for target in BUILT]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trained = train(row, kind, Path(scratch))
        except Impossible as reason:
            return [Cell(row.name, kind, t, "none", "-", str(reason)) for t in BUILT]
        return [_cell(row, kind, target, trained, Path(scratch)) for target in BUILT]


def _cell(row: Row, kind: str, target: str, trained: Trained, scratch: Path) -> Cell:
    def cell(status: str, text: str, detail: str = "") -> Cell:
        return Cell(row.name, kind, target, status, text, detail)

    try:
        error, failed = compare(trained, target, scratch / target)
    except (InputError, ParityError) as refusal:  # the second: no oracle to be trusted
        return cell("refused", f"refused: {refusal.found}", str(refusal))
    except Exception as fault:  # noqa: BLE001  # whatever it is, the cell is wrong
        return cell("wrong", f"WRONG: {type(fault).__name__}", str(fault))
    if row.must == "refused":
        return cell("wrong", "WRONG: built, must be refused")
    if trained.effect < EFFECT:
        return cell("wrong", f"WRONG: no effect ({trained.effect:.0e})")
    if failed or not error <= EXACT:
        return cell("wrong", f"WRONG: {error:.0e}", failed or "logits")
    return cell("exact", f"exact {error:.0e}")


def train(row: Row, kind: str, folder: Path) -> Trained:
    """Save a base and adapters of a row, all that is trained moved away from where it began."""
    base = save_base(kind, folder / "base", **{**LOUD, **_base_options(row, kind)})
    task = _task(row, kind)
    plain = _load(base, task)
    before = _answer(plain, task)
    options = [row.options] + ([{**row.options, **row.second}] if row.second else [])
    model, saved = None, []
    try:
        for number, chosen in enumerate(options):
            torch.manual_seed(number + 1)
            config = _config(row, kind, chosen, task)
            name = f"a{number}"
            if model is None:
                if row.tokens:
                    plain.resize_token_embeddings(row.tokens, mean_resizing=False)
                model = get_peft_model(plain, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            model.set_adapter(name)
            _move(model, row.spread)
            saved.append(folder / name)
        assert model is not None
        for path in saved:
            model.save_pretrained(folder, selected_adapters=[path.name])
        if len(saved) > 1:
            model.base_model.set_adapter([path.name for path in saved])
        after = before if row.must else _answer(model.eval(), task)
    except Exception as reason:  # what PEFT raises for what it does not have
        raise Impossible(f"{type(reason).__name__}: {reason}") from reason
    for path in saved:
        _patch(path / "adapter_config.json", row.patch)
    effect = np.inf if before.shape != after.shape else float(np.abs(before - after).max())
    return Trained(base, tuple(saved), after, float(effect))


def _base_options(row: Row, kind: str) -> dict[str, Any]:
    known = set(NAMES) if "attention_bias" not in row.base else {"llama", "qwen3"}
    return row.base if kind in known else {}


def _task(row: Row, kind: str) -> str:
    if row.task:
        return next(name for name, task in TASKS.items() if task.peft == row.task)
    return FEATURES if kind == "bert" else GENERATION


def _load(base: Path, task: str) -> Any:
    torch.manual_seed(0)
    auto = getattr(transformers, TASKS[task].auto)
    labels = {} if task in (FEATURES, GENERATION) else {"num_labels": LABELS}
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **labels)


def _config(row: Row, kind: str, options: dict[str, Any], task: str) -> Any:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(row.tuner)]
    settings = {"task_type": TASKS[task].peft, **named(options, NAMES[kind])}
    if kind == "gpt2" and hasattr(made, "fan_in_fan_out"):
        settings["fan_in_fan_out"] = True
    if row.options.get("target_parameters"):
        settings.pop("fan_in_fan_out", None)
    return made(**settings)


def _move(model: torch.nn.Module, spread: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += spread * torch.randn_like(parameter)


def _patch(path: Path, changed: dict[str, Any]) -> None:
    if changed:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def _answer(model: Any, task: str) -> np.ndarray:
    """Logits or features (positions, width) for IDS."""
    if task != GENERATION:
        return encode(model.eval(), IDS, np.ones_like(IDS), np.zeros_like(IDS))[0]
    with torch.inference_mode():
        return model.eval()(input_ids=torch.from_numpy(IDS), use_cache=False).logits[0].numpy()


def compare(trained: Trained, target: str, out: Path) -> tuple[float, str]:
    """(largest difference of logits, what failed to replay or nothing) of a real lowering."""
    recipe = Recipe(
        base=str(trained.base), adapters=[str(a) for a in trained.adapters], target=target, out=out
    )
    original = open_plan(recipe)
    with pass_context(Silent()) as context:
        plan = run_passes(passes_of(recipe, original, context), verify(original))
    out.mkdir()
    artifact = TARGETS[target].lower(plan, out, Silent())
    write_package(artifact, plan)
    with oracle_folders(original) as folders:
        request = ProofRequest.of_build(recipe, plan, artifact)
        job = replace(request.job(original, folders), threads=1)
        reference = Reference.open(job)
    found = _play(job)
    report, _ = replay(
        open_stored(target, out), dict(job.weights), reference.live, artifact.precision
    )
    reference.close()
    failed = "" if report["passed"] else f"replay: {report['failures'][0]}"
    if found.shape != trained.logits.shape:
        return np.inf, f"shape {found.shape}, expected {trained.logits.shape}"
    return float(np.abs(found - trained.logits).max()), failed


def _play(job: Job) -> np.ndarray:
    subject, mask = open_subject(job), np.ones_like(IDS)
    if job.task != GENERATION:
        return subject.encode(IDS, mask, np.zeros_like(IDS))[0]
    return subject.step(IDS, mask, np.arange(IDS.shape[1])[None], None)[0][0]


def run(rows: Sequence[Row], kinds: Sequence[str], jobs: int = 1) -> Iterator[list[Cell]]:
    """The cells of every row, base after base, as they are done."""
    tasks = [(row, kind) for row in rows for kind in kinds]
    if jobs == 1:
        for row, kind in tasks:
            yield cells_of(row, kind)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_quiet) as pool:
        yield from pool.map(cells_of, *zip(*tasks, strict=True))


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def show(rows: Sequence[Row], kinds: Sequence[str], cells: Iterable[Cell]) -> None:
    """The table, the reason for each cell that is not exact, and the count."""
    cells = list(cells)
    at = {(c.row, c.kind, c.target): c for c in cells}
    columns = [(kind, target) for kind in kinds for target in BUILT]
    short = {"safetensors": "st", "onnx": "onnx"}
    print(f"{'adapter':34}" + "".join(f"{f'{k} {short[t]}':16}" for k, t in columns))
    for row in rows:
        line = [at[row.name, kind, target].text[:15] for kind, target in columns]
        print(f"{row.name[:33]:34}" + "".join(f"{text:16}" for text in line))
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.status == "refused" or (cell.status == "none" and cell.detail[:3] != "not"):
            reasons.setdefault(
                f"{cell.row} {cell.status}: {cell.text[9:] or cell.detail}", []
            ).append(cell)
    print("\nrefused, or not to be had from PEFT:")
    for reason, of in reasons.items():
        places = sorted({f"{c.kind} {short[c.target]}" for c in of})
        print(f"  {reason[:200]}\n      {', '.join(places)}")
    for cell in cells:
        if cell.status == "wrong":
            print(
                f"WRONG {cell.row} / {cell.kind} / {cell.target}: {cell.text} {cell.detail[:600]}"
            )
    count = Counter(cell.status for cell in cells)
    print(f"\n{count['none']} cells are not to be had from PEFT")
    print(f"{count['exact']} exact, {count['refused']} refused, {count['wrong']} wrong")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KINDS, help="one kind of base")
    parser.add_argument("--row", default="", help="rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    _quiet()
    rows = [row for row in ROWS if asked.row in row.name]
    kinds = [asked.only] if asked.only else list(KINDS)
    cells = []
    for done in run(rows, kinds, asked.jobs):
        cells += done
        print(f"\r{len(cells)} of {2 * len(rows) * len(kinds)} cells", end="", file=sys.stderr)
    print(file=sys.stderr)
    show(rows, kinds, cells)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    return int(any(cell.status == "wrong" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
