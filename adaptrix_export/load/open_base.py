"""Open a base model from a checkpoint folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable

from adaptrix_export.load.base_model import open_checkpoint
from adaptrix_export.load.quantized.gguf_base import open_gguf
from adaptrix_export.load.source import resolve
from adaptrix_export.plan import Base


def open_base(spec: str, task: str = "auto", adapters: Iterable[str] = ()) -> Base:
    """Read the headers of the base that `spec` names (see `source.py` for the forms).

    `adapters` are the specs of the adapters of the build: their configs decide the task if `task`
    is auto.

    Raises SourceError for what is missing or damaged, UnsupportedError for what is refused.
    """
    source = resolve(spec)
    if source.gguf_file is not None:
        return open_gguf(source, source.gguf_file)
    return open_checkpoint(source, task, adapters)
