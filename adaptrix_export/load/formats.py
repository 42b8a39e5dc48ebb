"""Which format an adapter is in, by what lies in its folder, and the reader for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adaptrix_export.errors import SourceError
from adaptrix_export.load.adapters.adaptrix_adapter import METADATA, open_adaptrix
from adaptrix_export.load.adapters.folders import WEIGHTS_INDEX, nested_folder
from adaptrix_export.load.adapters.gguf_adapter import open_gguf_adapter
from adaptrix_export.load.adapters.mlx_adapter import WEIGHTS as MLX_WEIGHTS
from adaptrix_export.load.adapters.mlx_adapter import open_mlx
from adaptrix_export.load.adapters.peft_adapter import PICKLED, WEIGHTS, open_peft
from adaptrix_export.load.reading import DEFAULT, Reading
from adaptrix_export.load.source import Source, resolve
from adaptrix_export.plan import Adapter, Base

Reader = Callable[[Source, Base, str, Reading], Adapter]


def _has(*names: str) -> Callable[[Path], str]:
    """The first of these files that is there, or nothing."""
    return lambda folder: next((n for n in names if (folder / n).is_file()), "")


def _adaptrix(folder: Path) -> str:
    layers = (folder / METADATA).is_file() and any(folder.glob("layer_*.pt"))
    return METADATA if layers else ""


def _gguf(folder: Path) -> str:
    return next((path.name for path in sorted(folder.glob("*.gguf"))), "")


# (format, the file that shows it, its reader)
FORMATS: tuple[tuple[str, Callable[[Path], str], Reader], ...] = (
    ("PEFT", _has(WEIGHTS, WEIGHTS_INDEX, PICKLED), open_peft),
    ("mlx-lm", _has(MLX_WEIGHTS), open_mlx),
    ("Adaptrix", _adaptrix, open_adaptrix),
    ("GGUF", _gguf, open_gguf_adapter),
)


def open_adapter(
    spec: str, base: Base, name: str | None = None, reading: Reading = DEFAULT
) -> Adapter:
    """Read one adapter's headers against `base`, whatever its format; no weight is read.

    Raises SourceError for damage and for a folder of two formats, UnsupportedError for a kind
    that is refused, AdapterError for a tensor that belongs nowhere.
    """
    source, nested = _inside(resolve(spec))
    place = name or (Path(source.gguf_file).stem if source.gguf_file else "")
    place = place or source.folder.resolve().name
    if source.gguf_file:
        return open_gguf_adapter(source, base, place, reading)
    found = [(kind, file, read) for kind, shows, read in FORMATS if (file := shows(source.folder))]
    if len(found) > 1:
        raise SourceError(
            spec, " and ".join(f"{file} ({kind})" for kind, file, _ in found), "one format",
            "move one of them to a folder of its own",
        )  # fmt: skip
    if not found:
        return open_peft(source, base, place, reading)  # whose errors say what is missing
    kind, file, read = found[0]
    opened = read(
        Source(spec, source.folder, file) if kind == "GGUF" else source, base, place, reading
    )
    return replace(opened, notes=(*opened.notes, *nested))


def _inside(source: Source) -> tuple[Source, tuple[str, ...]]:
    """The sub-folder that has the adapter, where only one has."""
    if source.gguf_file is not None:
        return source, ()
    folder, notes = nested_folder(source.spec, source.folder)
    return replace(source, folder=folder), notes
