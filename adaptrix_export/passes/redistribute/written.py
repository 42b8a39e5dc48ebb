"""A redistributed adapter as a PEFT folder, and read again as the plan's adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load import open_adapter
from adaptrix_export.load.adapters.peft_form import peft_config
from adaptrix_export.load.adapters.peft_keys import module_paths
from adaptrix_export.passes.redistribute.moved import Place, Terms, as_term, factors
from adaptrix_export.plan import Adapter, Base, Delta, LowRank, Site, low_ranks
from adaptrix_export.save.machine_paths import without_machine_paths
from adaptrix_export.save.peft_folder import write_peft

PROVENANCE = "redistributed"  # beside what the source said, under our key of the file's metadata
# What the source's config says of itself and not of its factors.
_KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version")


def write_redistributed(
    base: Base,
    source: Adapter,
    stack: str,
    terms: Terms,
    outside: tuple[Delta, ...],
    folder: Path,
    step: str,
    retained: float,
) -> None:
    """Write `terms` at the layers of `stack` and the deltas `outside` of it.

    Terms that are the adapter's own keep their bytes and their scale. `step` and the share
    `retained` go into the file's metadata, beside the source's own metadata and config.
    """
    moved = [
        Delta(Site(stack, layer, module), (_one_term((layer, module), site_terms),))
        for (layer, module), site_terms in terms.items()
    ]
    unmoved = [replace(d, terms=(_one_term((-1, d.site.path), _low_rank(d)),)) for d in outside]
    deltas = tuple(sorted([*moved, *unmoved], key=lambda d: (d.site.order, d.parameter)))
    provenance: dict[str, Any] = {
        "step": step,
        "adapter": source.name,
        "config": dict(source.config),
        "retained": retained,
    }
    if PROVENANCE in source.metadata:  # moved a second time
        provenance["before"] = source.metadata[PROVENANCE]
    written = replace(
        source,
        deltas=deltas,
        config=_config(base, source, deltas, {layer for layer, _ in terms}, stack),
        metadata=without_machine_paths({**source.metadata, PROVENANCE: provenance}),
    )
    write_peft(written, base, folder)


def with_one_term_a_site(adapter: Adapter, base: Base) -> Adapter:
    """The same adapter in a form that PEFT has: sums of LoRA terms as one, and a config that says
    so. What has one term a site stays as it is."""
    if all(len(delta.terms) == 1 for delta in adapter.deltas):
        return adapter
    for delta in adapter.deltas:
        if len(_low_rank(delta)) != len(delta.terms):
            raise UnsupportedError(
                f"{adapter.name}: {delta.name}", "a sum with other terms than LoRA", "LoRA",
                "PEFT has one term a site; use target onnx or safetensors",
            )  # fmt: skip
    deltas = tuple(
        replace(d, terms=(_one_term((d.site.layer or -1, d.site.module), _low_rank(d)),))
        for d in adapter.deltas
    )
    return replace(adapter, deltas=deltas, config=_config(base, adapter, deltas, set(), ""))


def open_written(folder: Path, base: Base, source: Adapter) -> Adapter:
    """The adapter as it reads from that folder, under the name and the spec of its source."""
    return replace(open_adapter(str(folder), base, source.name), spec=source.spec)


def _low_rank(delta: Delta) -> tuple[LowRank, ...]:
    return tuple(low_ranks(delta.terms))


def _one_term(place: Place, site_terms: tuple[LowRank, ...]) -> LowRank:
    """PEFT has one term a site: the sum of several is one with their factors side by side."""
    return site_terms[0] if len(site_terms) == 1 else as_term(place, factors(site_terms))


def _config(
    base: Base, source: Adapter, deltas: tuple[Delta, ...], layers: set[int], stack: str
) -> dict[str, Any]:
    """An adapter_config.json for these deltas, with the layers named where that says it exactly."""
    terms = {d.site.path: t for d in deltas for t in low_ranks(d.terms)}
    config = peft_config(base, terms)
    config |= {key: source.config[key] for key in _KEPT if source.config.get(key) is not None}
    whole = sorted({r.site.path for r in source.replacements if not r.shared})
    rows = {r.site.path: list(r.rows) for r in source.replacements if r.rows is not None}
    config["modules_to_save"] = whole or None
    config["trainable_token_indices"] = rows or None
    short = {d.site.module for d in deltas if d.site.layer is not None}
    named = {f"{stack}.{layer}.{module}" for layer in layers for module in short}
    if layers and set(terms) == named and _only_in_stack(base, stack, short):
        config["target_modules"] = sorted(short)
        config["layers_to_transform"] = sorted(layers)
        config["layers_pattern"] = stack.rpartition(".")[2]
    return config


def _only_in_stack(base: Base, stack: str, short: set[str]) -> bool:
    """Whether these ends of paths mean modules of the stack's layers alone."""
    start = f"{stack}."
    ends = tuple(f".{name}" for name in short)
    for path in module_paths(base):
        if path in short or path.endswith(ends):
            layer, _, module = path.removeprefix(start).partition(".")
            if not path.startswith(start) or not layer.isdecimal() or module not in short:
                return False
    return True
