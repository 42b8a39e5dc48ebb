"""What a lowering leaves behind in the staging folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaptrix_export.graph.expression import Expression
from adaptrix_export.plan import Gate


@dataclass(frozen=True)
class Artifact:
    """Weights (and graph) written, not yet packaged, proved or published.

    `hashes`: file name -> sha256 of the files that lowering wrote, taken while writing.
    `weights`: tensor or initializer name -> expression over base tensor names (see
    `graph/expression.py`).
    `quantized`: initializer of the float graph -> what is stored in its place, and how it was made
    (see `precision/quantize.py`); `kept`: matrices that stayed float, and why.
    `untied`: tensors that the base shares and this artifact does not.
    `config_changes`: keys of config.json that the merge changes (`tie_word_embeddings`).
    `frontend`: what drew the graph, if there is one; `frontend_reason`: why `auto` took it.
    """

    folder: Path
    target: str
    precision: str
    hashes: Mapping[str, str]
    weights: Mapping[str, Expression]
    untied: tuple[str, ...]
    config_changes: Mapping[str, object]
    frontend: str | None = None
    frontend_reason: str | None = None
    gates: tuple[Gate, ...] = ()  # what of the plan's gates is in it: all, in the graph or merged
    gate_stats: bool = False  # the graph tells how far its gates were open
    # Of a switchable graph: its slots, its stamp and its adapters, as the manifest has them.
    switchable: Mapping[str, object] = field(default_factory=dict)
    quantized: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    kept_float: Mapping[str, str] = field(default_factory=dict)
