"""An mlx-lm adapter: `adapters.safetensors` and its own `adapter_config.json`.

`X.lora_a` is (in, r) and `X.lora_b` (r, out), both transposed compared with PEFT's, and `scale` is
the factor itself, not an alpha. Source: mlx_lm/tuner/lora.py and dora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.peft_form import Factors, foreign_adapter
from adaptrix_export.load.adapters.peft_keys import module_paths, one_site
from adaptrix_export.load.files.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.load.files.views import Transposed
from adaptrix_export.load.reading import Reading
from adaptrix_export.load.source import Source
from adaptrix_export.plan import Adapter, Base, Dora, LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
_PARTS = ("lora_a", "lora_b", "m")


def open_mlx(source: Source, base: Base, place: str, reading: Reading) -> Adapter:
    """Read the headers of an mlx-lm adapter.

    Raises UnsupportedError for full fine-tunes, mixtures of experts and old configs with an alpha;
    AdapterError for a tensor without a module, and for a missing factor.
    """
    config = read_json(source.folder / CONFIG)
    rank, scale, dora = _settings(place, config)
    factors: dict[str, dict[str, StoredTensor]] = {}
    spelled: dict[tuple[str, str], str] = {}
    modules = module_paths(base)
    for tensor in read_safetensors(source.folder / WEIGHTS).tensors:
        *words, part = tensor.name.split(".")
        if part not in _PARTS or not words:
            raise AdapterError(
                f"{place}: {tensor.name}", "a tensor that belongs to no site",
                "lora_a, lora_b or m", "was the file saved by another tool?",
            )  # fmt: skip
        path = one_site(place, tensor.name, tuple(words), modules)
        if (path, part) in spelled:
            raise AdapterError(
                f"{place}: {tensor.name}", f"the same tensor as {spelled[path, part]}",
                "each tensor once", "save the adapter again",
            )  # fmt: skip
        spelled[path, part] = tensor.name
        factors.setdefault(path, {})[part] = tensor
    terms = {p: _term(f"{place}: {p}", parts, rank, scale, dora) for p, parts in factors.items()}
    files: tuple[Path, ...] = (source.folder / CONFIG, source.folder / WEIGHTS)
    metadata = {"format": "mlx-lm", CONFIG: config}
    return foreign_adapter(place, source.spec, files, base, terms, metadata)


def _settings(place: str, config: Mapping[str, Any]) -> tuple[int, float, bool]:
    """(rank, scale, whether it is DoRA)."""
    place = f"{place}: {CONFIG}"
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(
            place, f"fine_tune_type {kind!r}", "lora or dora",
            "the weights of a full fine-tune are no adapter; use the fused model as the base",
        )  # fmt: skip
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise AdapterError(place, "no lora_parameters", "rank and scale", "save the adapter again")
    if "alpha" in settings:
        raise UnsupportedError(
            place, "lora_parameters with alpha", "rank and an absolute scale",
            "versions of mlx-lm differ on what alpha means; write the factor as scale, drop alpha",
        )  # fmt: skip
    rank, scale = settings.get("rank"), settings.get("scale")
    if isinstance(rank, int) and rank > 0 and isinstance(scale, (int, float)) and isfinite(scale):
        return rank, float(scale), kind == "dora"
    raise AdapterError(place, f"rank {rank!r}, scale {scale!r}", "numbers, rank at least 1")


def _term(
    place: str, parts: Mapping[str, StoredTensor], rank: int, scale: float, dora: bool
) -> Factors:
    needed = _PARTS if dora else _PARTS[:2]
    if set(parts) != set(needed):
        raise AdapterError(
            place, " and ".join(sorted(parts)), " and ".join(sorted(needed)),
            "the config belongs to other weights",
        )  # fmt: skip
    a, b = parts["lora_a"], parts["lora_b"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedError(
            place, f"factors of shape {list(a.shape)} and {list(b.shape)}", "matrices",
            "adapters of stacked experts cannot be built yet",
        )  # fmt: skip
    if a.shape[1] != rank or b.shape[0] != rank:
        raise AdapterError(
            place, f"rank {a.shape[1]} in lora_a and {b.shape[0]} in lora_b",
            f"{rank} by {CONFIG}", "the config belongs to other weights",
        )  # fmt: skip
    down, up = Transposed(a, by_format=True), Transposed(b, by_format=True)
    return Dora(down, up, scale, parts["m"]) if dora else LowRank(down, up, scale)
