"""An adapter as a folder of the original Adaptrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.adapters.adaptrix_adapter import METADATA
from adaptrix_export.load.adapters.adaptrix_adapter import OURS as ADAPTRIX_OURS
from adaptrix_export.load.adapters.peft_form import peft_config
from adaptrix_export.load.adapters.peft_keys import module_paths
from adaptrix_export.plan import Adapter, Base, Delta, Dora, LowRank, Scaled, Tensor, low_ranks
from adaptrix_export.save.adapter_json import only_term, write_json


def write_adaptrix(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write `metadata.json` and a `layer_<i>.pt` for each layer; needs torch.

    Each module has rank, alpha and scaling, since readers of the format read one or the other.
    Raises UnsupportedError for anything but LoRA on modules of layers.
    """
    layers: dict[int, dict[str, LowRank]] = {}
    for delta in adapter.deltas:
        layer, term = _layer_term(adapter, base, delta)
        layers.setdefault(layer, {})[delta.site.module] = term
    unsupported = ("modules_to_save", "layer_replication", "trainable_token_indices")
    other = next((key for key in unsupported if adapter.config.get(key)), None)
    if adapter.replacements or other:
        what = adapter.replacements[0].name if adapter.replacements else str(other)
        raise _unsupported(adapter, what, "more than LoRA factors")
    terms = {d.site.path: t for d in adapter.deltas for t in low_ranks(d.terms)}
    usual = peft_config(base, terms)
    original = adapter.metadata.get(METADATA)
    original_metadata = dict(original) if isinstance(original, dict) else {"version": "1.0"}
    original_metadata.setdefault("name", adapter.name)
    metadata = {
        **original_metadata,
        "target_layers": sorted(layers),
        "target_modules": sorted({m for modules in layers.values() for m in modules}),
        "rank": usual["r"],
        "alpha": usual["lora_alpha"],
        ADAPTRIX_OURS: {"adapter_config": dict(adapter.config), **_source(adapter)},
    }
    write_json(folder / METADATA, metadata)
    for layer, modules in sorted(layers.items()):
        _write_layer(folder / f"layer_{layer}.pt", modules)


def _source(adapter: Adapter) -> dict[str, Any]:
    """The metadata of another source format, as an entry `source`; empty for Adaptrix's own."""
    if not adapter.metadata or adapter.metadata.get("format") == "adaptrix":
        return {}
    return {"source": dict(adapter.metadata)}


def _layer_term(adapter: Adapter, base: Base, delta: Delta) -> tuple[int, LowRank]:
    term, site = only_term(adapter, delta), delta.site
    if not isinstance(term, LowRank):
        kind = {Dora: "DoRA", Scaled: "lora_bias"}.get(type(term), type(term).__name__)
        raise _unsupported(adapter, delta.name, kind)
    modules = module_paths(base)
    stacks = [s for s in base.architecture.stacks if f"{s.prefix}.{site.layer}" in modules]
    if site.layer is None or len(stacks) != 1:
        raise _unsupported(adapter, delta.name, "a module outside the one stack of layers")
    return site.layer, term


def _unsupported(adapter: Adapter, place: str, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.name}: {place}", problem, "LoRA on modules of layers",
        "an Adaptrix folder holds nothing else; use --to peft",
    )  # fmt: skip


def _write_layer(path: Path, modules: Mapping[str, LowRank]) -> None:
    import torch

    saved = {
        module: {
            "lora_A": _torch(term.a),
            "lora_B": _torch(term.b),
            "rank": term.rank,
            "alpha": term.scale * term.rank,
            "scaling": term.scale,
        }
        for module, term in sorted(modules.items())
    }
    torch.save(saved, path)


def _torch(tensor: Tensor) -> Any:
    """The tensor as a torch tensor with the same bits; bfloat16 is passed as integers."""
    import torch

    values = tensor.read()
    if tensor.dtype != "BF16":
        return torch.from_numpy(values)
    return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
