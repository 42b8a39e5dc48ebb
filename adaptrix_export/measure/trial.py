"""Candidates for a composition, measured: how far each is from every adapter on its own text.

Each adapter comes with a text of what it is for. On it, the divergence KL(adapter alone || base) is
what the adapter does there, and KL(adapter alone || composition) what a composition loses of that;
their ratio is its `loss`: 0 as good as alone, 1 as if it were not there. The candidate with the
smallest loss of its worst adapter is chosen. The rows of a text are divided: even ones choose, odd
ones, which had no say, are reported as `held_out`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.errors import RecipeError, UnsupportedError
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.text import read_text
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.oracle.compare import Logits, distance
from adaptrix_export.oracle.executed import on_a_copy, put_parameter, sharing
from adaptrix_export.oracle.peft_folders import OracleFolders, oracle_folders
from adaptrix_export.oracle.reference import bare_model
from adaptrix_export.plan import Base, Pass, Plan
from adaptrix_export.progress import Progress

ROWS, LENGTH = 8, 64  # of a text: the logits of all rows are kept
LEAST = 16  # tokens of a text
NOTHING = 1e-9  # nats: an adapter that does nothing on its text has nothing to lose

Rows = NDArray[np.int64]


def compare_candidates(
    plan: Plan, candidates: Sequence[Pass], texts: Mapping[str, Path], progress: Progress
) -> tuple[int, dict[str, Any]]:
    """Which of `candidates` is best for an uncomposed plan, and what was measured of each.

    Loads the base once, in float32. Raises RecipeError for a text that cannot be used,
    UnsupportedError for a model that does not generate text.
    """
    if plan.base.task != GENERATION:
        raise UnsupportedError(
            "compose.calibration", f"task {plan.base.task}", GENERATION, "leave calibration out"
        )
    rows = {a.name: text_rows(plan.base, texts[a.name]) for a in plan.adapters}
    with oracle_folders(plan) as folders, progress.stage("trials", len(candidates)) as advance:
        base = _base(plan.base, folders)
        _check_ids(rows, base)
        alone = {name: _alone(base, folders, name, ids) for name, ids in rows.items()}
        nothing = {name: _kl(alone[name], _logits(base, ids)) for name, ids in rows.items()}
        entries = []
        for candidate in candidates:
            model = _composed(base, verify(candidate(plan)))
            divergences = {
                name: _kl(alone[name], _logits(model, ids)) for name, ids in rows.items()
            }
            entries.append(_entry(candidate, divergences, nothing))
            advance(1)
    best = min(range(len(entries)), key=lambda i: (entries[i]["worst"], i))
    section = {"candidates": entries, "without": {n: _shown(kl) for n, kl in nothing.items()}}
    return best, section


def text_rows(base: Base, path: Path) -> Rows:
    """Token ids (rows, length) of a UTF-8 text, from its beginning; at least two rows."""
    place = f"compose.calibration: {path.name}"
    text = read_text(path, place)
    from transformers import AutoTokenizer

    extra = {"gguf_file": base.gguf_file} if base.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, **extra)
    except (OSError, ValueError) as error:
        raise RecipeError(
            place, "a base without a tokenizer", "one to read the text with",
            "add the tokenizer's files to the base, or leave calibration out",
        ) from error  # fmt: skip
    ids = np.array(tokenizer(text)["input_ids"][: ROWS * LENGTH], np.int64)
    if len(ids) < LEAST:
        raise RecipeError(place, f"{len(ids)} tokens", f"at least {LEAST}", "give a longer text")
    length = min(LENGTH, len(ids) // 2)
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def _base(base: Base, folders: OracleFolders) -> Any:
    torch.manual_seed(0)
    return bare_model(base.folder, base.gguf_file, base.task, folders.adapters, base.simulated)


def _check_ids(rows: Mapping[str, Rows], model: Any) -> None:
    size = int(model.get_input_embeddings().weight.shape[0])
    for name, ids in rows.items():
        if int(ids.max()) >= size:
            raise RecipeError(
                f"compose.calibration: {name}", f"token {int(ids.max())}", f"tokens below {size}",
                "does the tokenizer belong to the base?",
            )  # fmt: skip


def _alone(base: Any, folders: OracleFolders, name: str, ids: Rows) -> list[Logits]:
    """Logits of one adapter as stock PEFT runs it alone."""
    own = tuple(pair for pair in folders.adapters if pair[0] == name)
    return _logits(on_a_copy(base, own), ids)


def _composed(base: Any, plan: Plan) -> Any:
    """The base with the plan's changes in it."""
    model = sharing(base, set())
    changes = plan.changes()
    with layers_freed():
        values = {name: merged(change, "F32") for name, change in changes.items()}
    untied = plan.untied()
    for name, home in plan.base.tied.items():
        if home in values and name not in values and name not in untied:
            values[name] = values[home]  # what shares a changed tensor follows it
    for name, value in values.items():
        put_parameter(model, name, torch.from_numpy(np.ascontiguousarray(value)))
    return model


def _logits(model: Any, ids: Rows) -> list[Logits]:
    with torch.inference_mode():
        return [
            model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits[0].numpy()
            for row in ids
        ]


def _kl(alone: Sequence[Logits], other: Sequence[Logits]) -> tuple[float, float]:
    """Nats a token over the even rows and over the odd ones."""
    each = [distance(a, b).mean_kl for a, b in zip(alone, other, strict=True)]
    return float(np.mean(each[::2])), float(np.mean(each[1::2]))


def _entry(
    candidate: Pass,
    divergences: Mapping[str, tuple[float, float]],
    nothing: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    losses = {
        name: tuple(kl[i] / max(nothing[name][i], NOTHING) for i in (0, 1))
        for name, kl in divergences.items()
    }
    return {
        "compose": repr(candidate),
        "kl": {name: _shown(kl) for name, kl in divergences.items()},
        "loss": {name: _digits(loss[0]) for name, loss in losses.items()},
        "held_out": {name: _digits(loss[1]) for name, loss in losses.items()},
        "worst": _digits(max(loss[0] for loss in losses.values())),
    }


def _shown(kl: tuple[float, float]) -> dict[str, float]:
    return {"chosen_on": _digits(kl[0]), "held_out": _digits(kl[1])}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
