"""What a lowering leaves behind in the staging folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptrix_export.lower.weights import Expression


@dataclass(frozen=True)
class Artifact:
    """Weights (and graph) written, not yet packaged, proved or published.

    `hashes`: file name -> sha256 of the files that lowering wrote, taken while writing.
    `weights`: tensor or initializer name -> expression over base tensor names (see `weights.py`).
    `untied`: tensors that the base shares and this artifact does not.
    `config_changes`: keys of config.json that the merge changes (`tie_word_embeddings`).
    """

    folder: Path
    target: str
    precision: str
    hashes: Mapping[str, str]
    weights: Mapping[str, Expression]
    untied: tuple[str, ...]
    config_changes: Mapping[str, object]
    frontend: str | None = None
