"""An adapter of the original Adaptrix: `metadata.json` and one `layer_<i>.pt` for each layer.

Each layer file contains `{module: {lora_A (r, in), lora_B (out, r), rank?, alpha?, scaling?}}`. One
writer of that format stored rank and alpha, the other the scaling, and the last engine applied 1.0
in any case; the option `adaptrix_scaling` selects which to use.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import isfinite
from pathlib import Path
from typing import Any

from adaptrix_export.errors import AdapterError, SourceError
from adaptrix_export.load.adapters.peft_form import Factors, foreign_adapter
from adaptrix_export.load.adapters.peft_keys import module_paths
from adaptrix_export.load.files.tensors import StoredTensor, read_json
from adaptrix_export.load.files.torch_file import read_torch_file
from adaptrix_export.load.files.views import Transposed
from adaptrix_export.load.reading import Reading
from adaptrix_export.load.source import Source
from adaptrix_export.plan import Adapter, Base, LowRank

METADATA = "metadata.json"
OURS = "adaptrix_export"  # our own key in metadata.json
# Names that the original gave to modules of LLaMA, and what they are.
RENAMES = {"self_attn.dense": "self_attn.o_proj", "mlp.fc1": "mlp.gate_proj"}
_KNOWN = {"lora_A", "lora_B", "rank", "alpha", "scaling"}


def open_adaptrix(source: Source, base: Base, place: str, reading: Reading) -> Adapter:
    """Read an Adaptrix folder; tensors stay in their files.

    Raises SourceError or UnsupportedError for a damaged or suspicious layer file, AdapterError for
    layers, modules or numbers that are missing, duplicate or invalid.
    """
    metadata = read_json(source.folder / METADATA)
    notes: list[str] = []
    differing: list[str] = []
    terms: dict[str, Factors] = {}
    spelled: dict[str, str] = {}
    modules, files = module_paths(base), _layer_files(place, source.folder, metadata)
    for layer, path in files.items():
        for module, entry in _entries(place, path).items():
            where = f"{place}: {path.name}: {module}"
            _check_target(where, module, metadata)
            site = _site(where, base, layer, module, modules)
            if site in terms:
                raise AdapterError(
                    where, f"{site}, as {spelled[site]!r} is", "each module once", "drop one"
                )
            spelled[site] = module
            terms[site], note = _term(where, entry, metadata, reading.adaptrix_scaling)
            differing += [note] if note else []
    if differing:
        more = f" ({len(differing)} such modules)" if len(differing) > 1 else ""
        notes.append(differing[0] + more)
    renamed = {m for site, m in spelled.items() if not site.endswith("." + m)}
    for module in sorted(renamed):
        notes.append(f"{module} of the original format is {RENAMES[module]}")
    ours = metadata.get(OURS) if isinstance(metadata.get(OURS), dict) else {}
    assert isinstance(ours, dict)
    config = ours.get("adapter_config")
    return foreign_adapter(
        place,
        source.spec,
        (source.folder / METADATA, *files.values()),
        base,
        terms,
        {"format": "adaptrix", METADATA: metadata},
        tuple(notes),
        config if isinstance(config, dict) else None,
    )


def _layer_files(place: str, folder: Path, metadata: Mapping[str, Any]) -> dict[int, Path]:
    """Layer -> file; the files must be those that target_layers names."""
    target_layers = metadata.get("target_layers")
    if not isinstance(target_layers, list) or not all(
        type(n) is int and n >= 0 for n in target_layers
    ):
        raise AdapterError(
            f"{place}: {METADATA}", f"target_layers {target_layers!r}", "a list of layers"
        )
    files = {layer_of(path): path for path in folder.glob("layer_*.pt")}
    strange = [p.name for p in folder.glob("layer_*.pt") if p.name != f"layer_{layer_of(p)}.pt"]
    if strange or set(files) != set(target_layers):
        names = strange or sorted(p.name for n, p in files.items() if n not in target_layers)
        missing = sorted(set(target_layers) - set(files))
        raise AdapterError(
            place, f"{names[0]} beyond target_layers" if names else f"no layer_{missing[0]}.pt",
            f"a file for each of the layers {sorted(target_layers)}", "is the folder complete?",
        )  # fmt: skip
    return {layer: files[layer] for layer in sorted(target_layers)}


def layer_of(path: Path) -> int:
    """`layer_12.pt` -> 12; -1 for other names."""
    number = path.name.removeprefix("layer_").removesuffix(".pt")
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 7 else -1


def _entries(place: str, path: Path) -> Mapping[str, Mapping[str, Any]]:
    value = read_torch_file(path)
    good = isinstance(value, dict) and all(
        isinstance(m, str) and isinstance(e, dict) for m, e in value.items()
    )
    if not good:
        raise SourceError(f"{place}: {path.name}", "another structure", "{module: {lora_A, ...}}")
    entries: Mapping[str, Mapping[str, Any]] = value
    return entries


def _check_target(where: str, module: str, metadata: Mapping[str, Any]) -> None:
    target_modules = metadata.get("target_modules")
    if isinstance(target_modules, list) and module not in target_modules:
        raise AdapterError(
            where, "not in target_modules", ", ".join(map(str, target_modules)),
            f"correct {METADATA} or remove the module",
        )  # fmt: skip


def _site(where: str, base: Base, layer: int, module: str, modules: Set[str]) -> str:
    """The path of the base's module, from its own name or from the original system's name."""
    names = [module, RENAMES[module]] if module in RENAMES else [module]
    matches = [
        path
        for stack in base.architecture.stacks
        for name in names
        if (path := f"{stack.prefix}.{layer}.{name}") in modules
    ]
    if len(matches) == 1:
        return matches[0]
    raise AdapterError(
        where, f"could mean {' or '.join(matches)}" if matches else "no such module in that layer",
        "one module of the base", "was this adapter trained on another model?",
    )  # fmt: skip


def _term(
    where: str, entry: Mapping[str, Any], metadata: Mapping[str, Any], scaling: str
) -> tuple[LowRank, str]:
    """The factors of one module, and a note if its stored scaling differs from the one applied."""
    unknown = sorted(str(key) for key in entry if key not in _KNOWN)
    if unknown:
        raise AdapterError(where, f"unknown key {unknown[0]!r}", ", ".join(sorted(_KNOWN)))
    a, b = entry.get("lora_A"), entry.get("lora_B")
    for name, tensor in (("lora_A", a), ("lora_B", b)):
        if not isinstance(tensor, (StoredTensor, Transposed)) or len(tensor.shape) != 2:
            raise AdapterError(where, f"no matrix {name}", "lora_A (r, in) and lora_B (out, r)")
    assert isinstance(a, (StoredTensor, Transposed))
    assert isinstance(b, (StoredTensor, Transposed))
    rank = _number(where, "rank", entry, metadata)
    if a.shape[0] != b.shape[1] or rank not in (None, a.shape[0]):
        raise AdapterError(
            where, f"rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B",
            f"{rank:g} as stored" if rank is not None else "one rank", "the numbers do not fit",
        )  # fmt: skip
    scale = _scale(where, entry, metadata, scaling, a.shape[0])
    stored = _number(where, "scaling", entry, {})
    note = ""
    if stored is not None and stored != scale:
        note = f"{where} stores scaling {stored:g}, and {scale:g} is applied ({scaling})"
    return LowRank(a, b, scale), note


def _scale(
    where: str, entry: Mapping[str, Any], metadata: Mapping[str, Any], scaling: str, rank: int
) -> float:
    if scaling == "one":
        return 1.0
    key = "alpha" if scaling == "alpha_over_rank" else "scaling"
    value = _number(where, key, entry, metadata)
    if value is None:
        raise AdapterError(
            where, f"no {key}, which adaptrix_scaling {scaling} needs", "a number",
            "choose another with --adaptrix-scaling: alpha_over_rank, stored or one",
        )  # fmt: skip
    return value / rank if key == "alpha" else value


def _number(
    where: str, key: str, entry: Mapping[str, Any], metadata: Mapping[str, Any]
) -> float | None:
    """A number of the module, else of the whole adapter, else None."""
    value = entry.get(key, metadata.get(key))
    if value is None or (type(value) in (int, float) and isfinite(value)):
        return value  # type: ignore[no-any-return]
    raise AdapterError(where, f"{key} is no finite number", "a number")
