"""Open a base model, whatever its files are."""

from __future__ import annotations

from collections.abc import Iterable

from adaptrix_export.load.base_model import open_checkpoint
from adaptrix_export.load.quantized.gguf_base import open_gguf
from adaptrix_export.load.source import resolve
from adaptrix_export.plan import Base


def open_base(spec: str, task: str = "auto", adapters: Iterable[str] = ()) -> Base:
    """Read the headers of the base that `spec` names (see `source.py` for the forms).

    `adapters` are the specs of the adapters to come: they tell the task where `task` is auto.

    Raises SourceError for what is missing or damaged, UnsupportedError for what is refused.
    """
    source = resolve(spec)
    if source.gguf_file is not None:
        return open_gguf(source, source.gguf_file)
    return open_checkpoint(source, task, adapters)
