"""Detects the format of an adapter from the files in its folder, and selects the reader."""

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
from adaptrix_export.load.adapters.patterns import limited_patterns
from adaptrix_export.load.adapters.peft_adapter import PICKLED, WEIGHTS, open_peft
from adaptrix_export.load.reading import DEFAULT, Reading
from adaptrix_export.load.source import Source, resolve
from adaptrix_export.plan import Adapter, Base

Reader = Callable[[Source, Base, str, Reading], Adapter]


def _has(*names: str) -> Callable[[Path], str]:
    """Returns the first of these files that the folder has, or an empty string."""
    return lambda folder: next((n for n in names if (folder / n).is_file()), "")


def _adaptrix(folder: Path) -> str:
    layers = (folder / METADATA).is_file() and any(folder.glob("layer_*.pt"))
    return METADATA if layers else ""


def _gguf(folder: Path) -> str:
    return next((path.name for path in sorted(folder.glob("*.gguf"))), "")


# (format, function that returns the file it is recognised by, reader)
FORMATS: tuple[tuple[str, Callable[[Path], str], Reader], ...] = (
    ("PEFT", _has(WEIGHTS, WEIGHTS_INDEX, PICKLED), open_peft),
    ("mlx-lm", _has(MLX_WEIGHTS), open_mlx),
    ("Adaptrix", _adaptrix, open_adaptrix),
    ("GGUF", _gguf, open_gguf_adapter),
)


def open_adapter(
    spec: str, base: Base, name: str | None = None, reading: Reading = DEFAULT
) -> Adapter:
    """Read one adapter's headers against `base`, in any format; no weight is read.

    Raises SourceError for damage and for a folder of two formats, UnsupportedError for an
    unsupported kind, AdapterError for a tensor that belongs to no module.
    """
    with limited_patterns():
        return _open_adapter(spec, base, name, reading)


def _open_adapter(spec: str, base: Base, name: str | None, reading: Reading) -> Adapter:
    source, nested = _adapter_source(resolve(spec))
    place = name or (Path(source.gguf_file).stem if source.gguf_file else "")
    place = place or source.folder.resolve().name
    if source.gguf_file:
        return open_gguf_adapter(source, base, place, reading)
    matches = [
        (kind, file, read) for kind, shows, read in FORMATS if (file := shows(source.folder))
    ]
    if len(matches) > 1:
        raise SourceError(
            spec, " and ".join(f"{file} ({kind})" for kind, file, _ in matches), "one format",
            "move one of them to a folder of its own",
        )  # fmt: skip
    if not matches:
        return open_peft(source, base, place, reading)  # its errors name what is missing
    kind, file, read = matches[0]
    opened = read(
        Source(spec, source.folder, file) if kind == "GGUF" else source, base, place, reading
    )
    return replace(opened, notes=(*opened.notes, *nested))


def _adapter_source(source: Source) -> tuple[Source, tuple[str, ...]]:
    """The source of the adapter: a sub-folder of the named folder, if only that has an adapter."""
    if source.gguf_file is not None:
        return source, ()
    folder, notes = nested_folder(source.spec, source.folder)
    return replace(source, folder=folder), notes
