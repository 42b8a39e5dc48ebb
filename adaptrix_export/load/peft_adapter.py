"""A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, read from headers.

What PEFT does in silence is decided here in the open: each tensor in the file goes to exactly one
site or is named in an error, and each config field is understood or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import regex

from adaptrix_export.errors import AdapterError, SourceError, UnsupportedError
from adaptrix_export.load.source import resolve
from adaptrix_export.load.tensors import StoredTensor, read_json, read_safetensors
from adaptrix_export.plan import Adapter, Base, Delta, LowRank, Replacement

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PATTERN_SECONDS = 1.0  # a rank_pattern key is a regex from a stranger

# Fields of LoraConfig that the merge obeys, or that only matter while training.
_OBEYED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
_HARMLESS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "runtime_config", "eva_config", "peft_version",
    "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Initialisations that leave the base's weights alone; the others take a part out of the base.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def open_adapter(spec: str, base: Base, name: str | None = None) -> Adapter:
    """Read one adapter's headers against `base`; no weight is read.

    Raises SourceError for damage, UnsupportedError for a kind that is refused, AdapterError for
    a tensor that belongs nowhere.
    """
    source = resolve(spec)
    folder = source.folder
    config = read_json(folder / CONFIG)
    place = name or folder.resolve().name
    _check_config(place, config)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        found = "only adapter_model.bin, a pickle" if pickled else "no weights"
        raise SourceError(place, found, WEIGHTS, "save it with safe_serialization=True")
    stored = read_safetensors(folder / WEIGHTS).tensors
    factors, saved = _sort_tensors(place, config, stored)
    return Adapter(
        name=place,
        spec=spec,
        folder=folder,
        files=(folder / CONFIG, folder / WEIGHTS),
        config=config,
        deltas=_deltas(place, config, factors, base),
        replacements=tuple(
            Replacement(base.architecture.site_of(path), parameter, tensor)
            for (path, parameter), tensor in sorted(saved.items())
        ),
    )


def _check_config(place: str, config: Mapping[str, Any]) -> None:
    """Refuse by name whatever the merge would get wrong."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{place}: {CONFIG}", f"peft_type {kind!r}", "LORA", "other tuners cannot be built yet"
        )
    for key, value in sorted(config.items()):
        if key in _OBEYED or key in _HARMLESS or value in (None, False, {}, []):
            continue
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights":
            if value in _PLAIN_INITS:
                continue
        raise UnsupportedError(
            f"{place}: {CONFIG}", f"{key} = {value!r}", "plain LoRA",
            "this kind of adapter cannot be built yet",
        )  # fmt: skip


_Key = tuple[str, str]


def _sort_tensors(
    place: str, config: Mapping[str, Any], stored: tuple[StoredTensor, ...]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[_Key, StoredTensor]]:
    """Split the file into factors (module -> A, B) and whole parameters ((module, name) -> tensor)."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    saved: dict[_Key, StoredTensor] = {}
    whole = tuple(config.get("modules_to_save") or ())
    for tensor in stored:
        if not tensor.name.startswith(PREFIX):
            raise _unknown(place, tensor.name, f"a key that starts with {PREFIX!r}")
        path = tensor.name.removeprefix(PREFIX)
        module, _, last = path.rpartition(".")
        owner, _, factor = module.rpartition(".")
        if last == "weight" and factor in ("lora_A", "lora_B"):
            factors.setdefault(owner, {})[factor] = tensor
        elif last in ("weight", "bias") and _is_saved(module, whole):
            saved[module, last] = tensor
        else:
            raise _unknown(place, tensor.name, "lora_A.weight, lora_B.weight or modules_to_save")
    return factors, saved


def _is_saved(module: str, whole: tuple[str, ...]) -> bool:
    """PEFT's rule: the module's path ends with an entry of modules_to_save, at a dot."""
    return any(module == entry or module.endswith("." + entry) for entry in whole)


def _unknown(place: str, key: str, expected: str) -> AdapterError:
    return AdapterError(
        f"{place}: {key}", "a tensor that belongs to no site", expected,
        "PEFT would drop it in silence; was the file renamed or saved by another tool?",
    )  # fmt: skip


def _deltas(
    place: str,
    config: Mapping[str, Any],
    factors: Mapping[str, Mapping[str, StoredTensor]],
    base: Base,
) -> tuple[Delta, ...]:
    deltas = []
    for path, pair in factors.items():
        if set(pair) != {"lora_A", "lora_B"}:
            missing = "lora_B" if "lora_A" in pair else "lora_A"
            raise AdapterError(f"{place}: {path}", f"no {missing}", "both factors", "save it again")
        a, b = pair["lora_A"], pair["lora_B"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise UnsupportedError(
                f"{place}: {path}", f"factors of shape {a.shape} and {b.shape}", "matrices",
                "convolutions cannot be built yet",
            )  # fmt: skip
        rank, scale = _rank_and_scale(place, path, config)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"{place}: {path}", f"rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B",
                f"{rank} by {CONFIG}", "the config belongs to other weights",
            )  # fmt: skip
        deltas.append(Delta(base.architecture.site_of(path), (LowRank(a, b, scale),)))
    return tuple(sorted(deltas, key=lambda d: d.site.order))


def _rank_and_scale(place: str, path: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scaling at one module, by PEFT's rule: alpha/r, or alpha/sqrt(r) for rsLoRA."""
    rank = _by_pattern(place, path, config.get("rank_pattern"), config.get("r"))
    alpha = _by_pattern(place, path, config.get("alpha_pattern"), config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise AdapterError(
            f"{place}: {path}", f"r = {rank!r}, lora_alpha = {alpha!r}", "numbers, r at least 1"
        )
    # rsLoRA, https://arxiv.org/abs/2312.03732
    return rank, alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(place: str, path: str, patterns: Any, default: Any) -> Any:
    """The value of the first pattern that matches `(.*\\.)?(pattern)$`, else the default."""
    for pattern, value in (patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", path, timeout=PATTERN_SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            raise AdapterError(
                f"{place}: {CONFIG}", f"pattern {pattern!r} ({error or 'took too long'})",
                "a regular expression", "name the modules plainly",
            ) from error  # fmt: skip
    return default
