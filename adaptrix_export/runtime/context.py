"""What the gates of an artifact say of a text: how far they were open, site by site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.graph import ADAPTER_IDS, DecoderGraph
from adaptrix_export.runtime.selection import Choice

OUTPUTS = {"gate_mean": "context.gate_mean", "gate_min": "context.gate_min",
           "clamped": "context.clamped"}  # fmt: skip


@dataclass(frozen=True)
class SiteStatistics:
    """Of one site over the tokens of a text: mean and least gate, share of tokens clamped."""

    site: str
    gate_mean: float
    gate_min: float
    clamped: float


def context_statistics(
    folder: Path, graph: DecoderGraph, choice: Choice, ids: Sequence[int]
) -> list[SiteStatistics]:
    """The statistics of one pass over `ids`, in the order of the manifest.

    Gates look at one token at a time, so a pass over a prompt and its answer says what generating
    the answer did. A site that the adapters of `choice` leave alone has a gate of 1. Raises
    SourceError for an artifact without statistics.
    """
    import onnxruntime

    sites = _sites(folder)
    row = np.array([ids], np.int64)
    fed: dict[str, Any] = {"input_ids": row, "attention_mask": np.ones_like(row)}
    if graph.takes_positions:
        fed["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
    if graph.takes_ids:
        fed[ADAPTER_IDS] = choice.row_ids(1)
    make = onnxruntime.OrtValue
    values = {name: make.ortvalue_from_numpy(array) for name, array in fed.items()}
    for slot in graph.cache:
        shape = [1, slot.heads, 0, slot.size]
        values[slot.past] = make.ortvalue_from_shape_and_type(shape, slot.element)
    outputs = graph.session.run_with_ort_values(
        list(OUTPUTS.values()), {**values, **choice.factors()}
    )  # fmt: skip
    numbers = [value.numpy() for value in outputs]
    return [SiteStatistics(s, *(float(n[i]) for n in numbers)) for i, s in enumerate(sites)]


def _sites(folder: Path) -> list[str]:
    """The sites whose gates depend on the data, as the artifact's manifest lists them."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        context = manifest.get("context") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(str(folder), f"no manifest ({error})", "an artifact folder") from error
    if not context.get("stats"):
        raise SourceError(
            str(folder), "a graph without statistics of gates", "one built with context.stats",
            "build it again with `--set context.stats=true`",
        )  # fmt: skip
    return [gate["site"] for gate in context["gates"] if gate["mode"] != "blend"]
