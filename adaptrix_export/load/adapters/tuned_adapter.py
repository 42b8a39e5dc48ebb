"""A PEFT folder of a tuner other than LoRA: headers sorted into sites by the tuner's table row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.peft_keys import saved_by
from adaptrix_export.load.adapters.plain_copy import plain_copy
from adaptrix_export.load.adapters.stored_weights import StoredWeights
from adaptrix_export.load.adapters.tuners import REFUSED, REPLACING, TUNERS, Tuner
from adaptrix_export.load.files.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.plan import Adapter, Base, Delta, Replacement, Site, Tuned

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."


class SortedTensors(NamedTuple):
    """Tensors of an adapter's file: by module, shared by all modules, and whole parameters."""

    parts: dict[str, dict[str, StoredTensor]]  # module path -> part -> tensor
    shared: tuple[StoredTensor, ...]
    whole: dict[tuple[str, str], StoredTensor]  # (module path, parameter) -> tensor


def open_tuned(
    place: str,
    spec: str,
    folder: Path,
    config: Mapping[str, Any],
    base: Base,
    weights: StoredWeights,
) -> Adapter:
    """The adapter in `folder`, from its headers; `config` is its parsed adapter_config.json.

    Raises UnsupportedError for a tuner that cannot be merged, AdapterError for a tensor that
    belongs to no module.
    """
    kind = str(config.get("peft_type"))
    tuner = _tuner(place, kind)
    _check_needs(place, config, tuner)
    plain = plain_copy(folder, base, tuner, weights)
    files = (folder / CONFIG, *weights.files)
    source, folder = folder, plain.folder or folder
    sorted_tensors = sort_tensors(place, config, tuner, read_safetensors(folder / WEIGHTS).tensors)
    deltas: list[Delta] = []
    replacements = [
        Replacement(base.architecture.site_of(path), parameter, tensor, shared=own is None)
        for (path, parameter), tensor in sorted(sorted_tensors.whole.items())
        for own in [saved_by(path, config.get("modules_to_save"))]
    ]
    paths = module_paths(place, config, tuner, sorted_tensors, base)
    for site in (base.architecture.site_of(path) for path in paths):
        tensors = sorted_tensors.parts.get(site.path, {})
        if kind in REPLACING:
            replacements += _replacements(place, kind, config, site, tensors)
        else:
            deltas += _deltas(place, kind, folder, base, site, tuple(tensors.values()))
    return Adapter(
        name=place,
        spec=spec,
        folder=source,
        files=files,
        config=config,
        deltas=tuple(sorted(deltas, key=lambda d: (d.site.order, d.parameter))),
        replacements=tuple(replacements),
        notes=(*plain.notes, *weights.notes),
        foreign=plain.folder is not None,
        peft_copy=plain.folder,
        shared=sorted_tensors.shared,
    )


def _tuner(place: str, kind: str) -> Tuner:
    if kind in REFUSED:
        why, remedy = REFUSED[kind]
        raise UnsupportedError(
            f"{place}: {CONFIG}", f"peft_type {kind}: {why}", "a tuner that merges", remedy
        )
    tuner = TUNERS.get(kind) or REPLACING.get(kind)
    if tuner is None:
        known = ", ".join(sorted({"LORA", *TUNERS, *REPLACING}))
        raise UnsupportedError(
            f"{place}: {CONFIG}", f"peft_type {kind!r}", known,
            "this tuner is not known; merge it with PEFT and build the merged model",
        )  # fmt: skip
    return tuner


def _check_needs(place: str, config: Mapping[str, Any], tuner: Tuner) -> None:
    for name, (required, remedy) in tuner.needs.items():
        value = config.get(name, required)
        if value != required and (value or required):
            raise UnsupportedError(
                f"{place}: {CONFIG}", f"{name} = {value!r}", f"{required!r}", remedy
            )


def sort_tensors(
    place: str, config: Mapping[str, Any], tuner: Tuner, stored: tuple[StoredTensor, ...]
) -> SortedTensors:
    """Sort the file's tensors. Raises AdapterError for one that belongs to no module."""
    sorted_tensors = SortedTensors({}, (), {})
    shared = []
    for tensor in stored:
        if tuner.is_shared(tensor.name.removeprefix(_SHARED_PREFIX)):
            shared.append(tensor)
            continue
        inside = tensor.name.startswith(PREFIX)
        key = tensor.name.removeprefix(PREFIX)
        if inside and (at := tuner.part_of(key)):
            sorted_tensors.parts.setdefault(at[0], {})[at[1]] = tensor
            continue
        path, _, parameter = key.rpartition(".")
        if not (inside and path and _is_whole(path, parameter, config)):
            raise AdapterError(
                f"{place}: {tensor.name}", "a tensor that belongs to no site",
                f"{PREFIX}<module>.<{tuner.parts}>",
                "PEFT would drop it in silence; was the file renamed or saved by another tool?",
            )  # fmt: skip
        sorted_tensors.whole[path.removesuffix(".base_layer"), parameter] = tensor
    return sorted_tensors._replace(shared=tuple(shared))


def _is_whole(path: str, parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether the adapter may ship a whole parameter: saved modules, trained biases, embeddings."""
    if parameter not in ("weight", "bias"):
        return False
    trained_bias = parameter == "bias" and config.get("bias", "none") != "none"
    return (
        bool(saved_by(path, config.get("modules_to_save")))
        or trained_bias
        or path.endswith(".base_layer")
    )


def module_paths(
    place: str, config: Mapping[str, Any], tuner: Tuner, sorted_tensors: SortedTensors, base: Base
) -> list[str]:
    """Paths of the modules that the adapter changes, sorted: those that have tensors.

    A tuner whose modules share all tensors stores none for single modules; then the config's
    `target_modules` selects among the base's matrices.
    """
    if sorted_tensors.parts or not tuner.by_config:
        return sorted(sorted_tensors.parts)
    targets = config.get("target_modules")
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(name):
            raise UnsupportedError(
                f"{place}: {CONFIG}", f"{name} = {config[name]!r}", "none",
                "save the adapter with save_indices=True, so that its file names its modules",
            )  # fmt: skip
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UnsupportedError(
            f"{place}: {CONFIG}", f"target_modules = {targets!r}", "a list of module names",
            "save the adapter with save_indices=True, so that its file names its modules",
        )  # fmt: skip
    names = (name.removesuffix(".weight") for name, t in base.tensors.items() if len(t.shape) == 2)
    ends = tuple("." + target for target in targets)
    return sorted(name for name in names if name in targets or name.endswith(ends))


def _deltas(
    place: str,
    kind: str,
    folder: Path,
    base: Base,
    site: Site,
    tensors: tuple[StoredTensor, ...],
) -> list[Delta]:
    """The terms of one module: its weight's, its bias's, or both."""
    tuner = TUNERS[kind]
    name = f"{site.path}.bias"
    has_bias = base.tied.get(name, name) in base.tensors
    if tuner.adds_bias and not has_bias:
        raise UnsupportedError(
            f"{place}: {site.path}", f"no bias in the base, and {kind} adds one", "a bias",
            "target only modules that have a bias",
        )  # fmt: skip
    changed = ["weight"] if tuner.weight else []
    changed += ["bias"] if has_bias and (tuner.bias or tuner.adds_bias) else []
    terms = [
        Tuned(folder, kind, site.path, parameter, base, tensors if i == 0 else ())
        for i, parameter in enumerate(changed)
    ]
    return [Delta(site, (term,), term.parameter) for term in terms]


def _replacements(
    place: str, kind: str, config: Mapping[str, Any], site: Site, parts: dict[str, StoredTensor]
) -> list[Replacement]:
    """The replacements of LN tuning and of trainable tokens."""
    if kind == "LN_TUNING":
        return [
            Replacement(site, part.rpartition(".")[2], tensor) for part, tensor in parts.items()
        ]
    rows = config.get("token_indices")
    if not isinstance(rows, list) or not all(type(row) is int for row in rows):
        raise AdapterError(f"{place}: {CONFIG}", f"token_indices = {rows!r}", "a list of rows")
    tensor = parts["trainable_tokens_delta"]
    return [Replacement(site, "weight", tensor, shared=True, rows=tuple(rows))]


def tuner_keys(folder: Path) -> tuple[dict[str, Any], SortedTensors]:
    """Config and sorted tensors of a folder that was opened before."""
    config = read_json(folder / CONFIG)
    tuner = _tuner(folder.name, str(config.get("peft_type")))
    stored = read_safetensors(folder / WEIGHTS).tensors
    return config, sort_tensors(folder.name, config, tuner, stored)
