"""An adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.adapters.peft_adapter import CONFIG, OURS, WEIGHTS
from adaptrix_export.load.adapters.peft_form import Factors, config_matches, peft_config
from adaptrix_export.load.adapters.peft_keys import PREFIX
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.plan import (
    Adapter,
    Base,
    Delta,
    Dora,
    LowRank,
    Plan,
    Tensor,
    Term,
)
from adaptrix_export.save.adapter_json import json_line, only_term, write_json
from adaptrix_export.save.parameters import parameter_config, parameter_tensors
from adaptrix_export.save.safetensors_file import write_safetensors


def write_peft(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; same adapter, same bytes.

    The adapter's own configuration is kept if it agrees with the terms, else their ranks and scales
    are written into it. Raises UnsupportedError for a sum of several terms at one site.
    """
    tensors: dict[str, Tensor] = {saved.tensor.name: saved.tensor for saved in adapter.replacements}
    factors: dict[str, Factors] = {}
    stacked = [delta for delta in adapter.deltas if delta.terms[0].is_stacked]
    for delta in adapter.deltas:
        term = only_term(adapter, delta)
        if term.is_stacked:
            continue
        if isinstance(term, (LowRank, Dora)):
            factors[delta.site.path] = term
        tensors.update(peft_tensors(base, delta, term))
    tensors.update(parameter_tensors(base, stacked))
    strange = next((name for name in sorted(tensors) if not name.startswith(PREFIX)), None)
    if strange is not None:
        raise UnsupportedError(
            f"{adapter.name}: {strange}", "a replacement without a name in PEFT", "one of PEFT's"
        )
    config = dict(adapter.config)
    if not config_matches(adapter.name, config, factors):
        config.update(peft_config(base, factors))
    if adapter.written or stacked:
        config.update(parameter_config(config, factors, stacked))
    write_json(folder / CONFIG, config)
    noted = {OURS: json_line(adapter.metadata)} if adapter.metadata else {}
    write_safetensors(folder / WEIGHTS, tensors, {**noted, "format": "pt"})


def peft_tensors(base: Base, delta: Delta, term: Term) -> dict[str, Tensor]:
    """PEFT's key -> tensor, for one term of a delta. Raises UnsupportedError for a kind of term
    that PEFT has no keys for."""
    embedding = base.architecture.is_transposed(delta.site) and delta.site.layer is None
    tensors = term.peft_tensors(embedding)
    if not tensors:
        raise UnsupportedError(delta.name, f"a {type(term).__name__} term", "LoRA")
    return {f"{PREFIX}{delta.site.path}.{ending}": t for ending, t in tensors.items()}


@dataclass(frozen=True)
class PeftFolders:
    """(name, folder) of each adapter for stock PEFT, and the names of converted ones."""

    adapters: tuple[tuple[str, Path], ...]
    converted: tuple[str, ...]


@contextmanager
def peft_folders(plan: Plan) -> Iterator[PeftFolders]:
    """The adapters of `plan` as folders that stock PEFT reads: originals, or temporary copies."""
    converted = tuple(a.name for a in plan.adapters if a.foreign)
    with scratch_folder("peft") as scratch:
        pairs = []
        for i, adapter in enumerate(plan.adapters):
            folder = adapter.folder
            if adapter.peft_copy is not None:
                folder = adapter.peft_copy
            elif adapter.foreign:
                folder = scratch / f"{i}"
                folder.mkdir()
                write_peft(adapter, plan.base, folder)
            pairs.append((adapter.name, folder))
        yield PeftFolders(tuple(pairs), converted)
