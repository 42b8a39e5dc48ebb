"""What the gates of an artifact say of a text: how far they were open, site by site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError

OUTPUTS = {"gate_mean": "context.gate_mean", "gate_min": "context.gate_min",
           "clamped": "context.clamped"}  # fmt: skip


@dataclass(frozen=True)
class SiteStatistics:
    """Of one site over the tokens of a text: mean and least gate, share of tokens clamped."""

    site: str
    gate_mean: float
    gate_min: float
    clamped: float


def context_statistics(folder: Path, ids: Sequence[int]) -> list[SiteStatistics]:
    """The statistics of one pass over `ids`, in the order of the manifest.

    Gates look at one token at a time, so a pass over a prompt and its answer says what generating
    the answer did. Raises SourceError for an artifact without statistics.
    """
    import onnxruntime

    sites = _sites(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    row = np.array([ids], np.int64)
    fed: dict[str, Any] = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    inputs = {value.name: value for value in session.get_inputs()}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            shape = [1, *(n if isinstance(n, int) else 0 for n in value.shape[1:])]
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            fed[name] = np.zeros(shape, kind)
    found = session.run(list(OUTPUTS.values()), {n: v for n, v in fed.items() if n in inputs})
    return [
        SiteStatistics(site, *(float(values[i]) for values in found))
        for i, site in enumerate(sites)
    ]


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
