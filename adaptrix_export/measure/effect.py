"""What a gated plan makes of its adapters, beside their plain merge, measured in PyTorch.

The base, the plain merge (every adapter as it came), the redistributed adapter where there is one,
and the plan with its gates run over the same text, as stock PEFT and the oracle's hooks run them.
All share the base's parameters. `drift` is |y - y0| / |y0| at the adapted modules, y0 what the
module's own weight makes of the same input: over all of them and all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrix_export.arch.tasks import SEQ2SEQ
from adaptrix_export.measure.divergence import Divergence, rounded
from adaptrix_export.measure.drift import note_ratios, text_rows
from adaptrix_export.oracle.executed import on_a_copy
from adaptrix_export.oracle.gated import LiveGates
from adaptrix_export.oracle.job import gate_specs
from adaptrix_export.oracle.layered import ADAPTED, BASE
from adaptrix_export.oracle.peft_folders import Folders, oracle_folders
from adaptrix_export.oracle.reference import bare_model, encode
from adaptrix_export.oracle.translated import LiveTranslator, one_row
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress

EFFECT = "effect"  # in Plan.measured
MOVED, GATED = "redistributed", "gated"
Ids = NDArray[np.int64]
Ask = Callable[[Ids], torch.Tensor]  # one row of ids -> the model's answer to it


@dataclass
class _Variant:
    """One of the models: its answer to a row, and what was seen at its adapted modules."""

    ask: Ask
    sites: int = 0
    ratios: list[NDArray[np.float64]] = field(default_factory=list)
    gates: LiveGates | None = None


def measure(
    original: Plan, plan: Plan, rows: Ids | None, text: str | None, progress: Progress
) -> dict[str, Any]:
    """The section of the report: figures of `divergence.py` and the drift, model by model.

    `original` is the plan before any pass, `plan` the gated one, both with adapters that PEFT can
    load. `rows` (rows, tokens) are token ids that no strategy has seen; None takes the text that
    gates are calibrated on.
    """
    with _variants(original, plan, progress) as variants:
        if rows is None:
            source, batches = text_rows(original, *variants.limits, text)
        else:
            source, batches = "held-out calibration text", [row[None] for row in rows]
        others = [name for name in variants.models if name != ADAPTED]
        total = Divergence(others, original.base.task)
        with progress.stage("effect beside the plain merge", len(batches), "rows") as advance:
            for ids in batches:
                answers = {name: one.ask(ids) for name, one in variants.models.items()}
                total.add(torch.from_numpy(ids), answers)
                advance(1)
        figures = {name: _figures(name, one, total) for name, one in variants.models.items()}
    return {
        "measure": total.measure,
        "agreement": total.agreement_name,
        "text": source,
        "tokens": total.tokens,
        "models": figures,
    }


def _figures(name: str, one: _Variant, total: Divergence) -> dict[str, Any]:
    merge = name == ADAPTED  # what the others are compared with
    figures: dict[str, Any] = {
        "kl": 0.0 if merge else total.kl(name),
        "retained": 1.0 if merge else total.retained(name),
        "agreement": 1.0 if merge else total.agreement(name),
        "gain": total.gain(name),  # None for the merge, too, where it gains nothing on this text
    }
    loss = total.loss()
    if loss:
        figures["loss"] = rounded(loss[name])
    figures["sites"] = one.sites
    if one.ratios:
        every = np.concatenate(one.ratios)
        figures["drift"] = {
            "median": _finite(np.median(every)),
            "p99": _finite(np.quantile(every, 0.99)),
            "max": _finite(every.max()),
        }
    if one.gates is not None and (clamped := one.gates.statistics()["clamped"]):
        figures["clamped"] = rounded(float(np.mean(clamped)))
    return figures


def _finite(value: Any) -> float | None:
    """None where the base's own output is zero, and any drift infinite."""
    return rounded(float(value)) if np.isfinite(value) else None


@dataclass(frozen=True)
class _Found:
    models: dict[str, _Variant]
    limits: tuple[int, int | None]  # tokens in the vocabulary, positions


@contextmanager
def _variants(original: Plan, plan: Plan, progress: Progress) -> Iterator[_Found]:
    """The models by name, as long as the context: their adapters' folders are temporary."""
    moved = plan.redistributed  # composed adapters are still those of the files
    with ExitStack() as stack:
        own = stack.enter_context(oracle_folders(original)).adapters
        new = stack.enter_context(oracle_folders(_as_it_is(plan))).adapters if moved else own
        with progress.stage("effect: loading base and adapters"):
            task, of = plan.base.task, original.base
            base = bare_model(of.folder, of.gguf_file, task, own, of.simulated)
            models = {BASE: _Variant(_asking(base, task)), ADAPTED: _adapted(base, task, own)}
            if moved:
                models[MOVED] = _adapted(base, task, new)
            models[GATED] = _adapted(base, task, new, plan)
        config = base.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        yield _Found(models, (int(base.get_input_embeddings().weight.shape[0]), positions))


def _as_it_is(plan: Plan) -> Plan:
    """A redistributed plan, whose adapters are files that PEFT reads as they are."""
    return Plan(plan.base, plan.adapters)


def _adapted(base: Any, task: str, folders: Folders, gated: Plan | None = None) -> _Variant:
    """The base with adapters, and the gates of `gated`; watched where it is adapted."""
    model = on_a_copy(base, folders)
    plain = model.get_base_model()
    gates = LiveGates(plain, gate_specs(gated.gates)) if gated is not None else None
    variant = _Variant(_asking(model, task), gates=gates)
    for module in plain.modules():
        if hasattr(module, "get_base_layer") and len(getattr(module, "lora_A", ())):
            # after the gate's own hook, so that it sees what the gate let through
            module.register_forward_hook(note_ratios(variant.ratios))
            variant.sites += 1
    return variant


def _asking(model: Any, task: str) -> Ask:
    """An encoder-decoder is asked to copy the text."""

    def ask(ids: Ids) -> torch.Tensor:
        mask = np.ones_like(ids)
        if task == SEQ2SEQ:
            logits = LiveTranslator(model).translate(one_row(ids[0].tolist()), [ids[0].tolist()])
        else:
            logits = encode(model, ids, mask, np.zeros_like(ids))
        return torch.from_numpy(logits)

    return ask
