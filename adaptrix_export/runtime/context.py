"""What the gates of an artifact say of a text: how far they were open, site by site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import MANIFEST, ArtifactFiles
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
    files: ArtifactFiles, graph: DecoderGraph, choice: Choice, ids: Sequence[int]
) -> list[SiteStatistics]:
    """The statistics of one pass over `ids`, in the order of the manifest.

    Gates look at one token at a time, so a pass over a prompt and its answer says what generating
    the answer did. A site that the adapters of `choice` leave alone has a gate of 1. Raises
    SourceError for an artifact without statistics.
    """
    import onnxruntime

    sites = _sites(files)
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


def _sites(files: ArtifactFiles) -> list[str]:
    """The sites whose gates depend on the data, as the artifact's manifest lists them."""
    place = str(files.folder)
    if not files.manifest:
        raise SourceError(place, f"no {MANIFEST}", "an artifact folder")
    try:
        context = files.manifest.get("context") or {}
        if context.get("stats"):
            return [str(gate["site"]) for gate in context["gates"] if gate["mode"] != "blend"]
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{place}/{MANIFEST}: context", f"unreadable ({error!r})", "gates by site",
            "build again",
        ) from error  # fmt: skip
    raise SourceError(
        place, "a graph without statistics of gates", "one built with context.stats",
        "build it again with `--set context.stats=true`",
    )  # fmt: skip
