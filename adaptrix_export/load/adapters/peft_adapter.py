"""A PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, read from headers.

PEFT ignores unknown tensors and fields; here each tensor in the file belongs to exactly one site or
is named in an error, and each config field is supported or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import regex

from adaptrix_export.errors import AdapterError, SourceError, UnsupportedError
from adaptrix_export.load.adapters.config_fields import check_adapter_config
from adaptrix_export.load.adapters.expert_loras import take_experts
from adaptrix_export.load.adapters.folders import CONFIG, PICKLED, WEIGHTS, check_is_adapter
from adaptrix_export.load.adapters.new_embeddings import FILE as ROWS
from adaptrix_export.load.adapters.new_embeddings import added_rows
from adaptrix_export.load.adapters.parameters import RankAndScale, take_parameters
from adaptrix_export.load.adapters.patterns import ends_with, search
from adaptrix_export.load.adapters.peft_keys import PREFIX, read_keys, saved_by
from adaptrix_export.load.adapters.prompt_adapter import KINDS as PROMPTS
from adaptrix_export.load.adapters.prompt_adapter import open_prompt
from adaptrix_export.load.adapters.stored_weights import OURS, stored_weights
from adaptrix_export.load.adapters.tuned_adapter import open_tuned
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.files.views import FileTensor, Flattened, orient_factors
from adaptrix_export.load.reading import Reading
from adaptrix_export.load.source import Source
from adaptrix_export.plan import (
    Adapter,
    Base,
    Delta,
    Dora,
    LowRank,
    Replacement,
    Scaled,
    Site,
    Tensor,
    low_ranks,
)

__all__ = ["CONFIG", "OURS", "PICKLED", "WEIGHTS", "open_peft", "rank_and_scale"]

# Fields of LoraConfig that the merge obeys, or that only matter while training.
_OBEYED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters",
}  # fmt: skip
_HARMLESS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "runtime_config", "eva_config", "peft_version",
    "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_MERGE = "merge this adapter with PEFT and build the merged model"
_INPUTS = "what it adds depends on the input, so it cannot be merged; serve it with PEFT"
# Fields of LoraConfig that are understood and refused, with what to do.
_REFUSED = {
    "init_lora_weights": "this initialisation takes a part out of the base: save the adapter with "
    "path_initial_model_for_weight_conversion, which makes a plain LoRA of it, or keep the base "
    "that it was trained on beside it, and set init_lora_weights to true",
    "bias": "the bias setting must be none, all or lora_only",
    "alora_invocation_tokens": _INPUTS,
    "arrow_config": _INPUTS,
    "use_qalora": _MERGE,
    "use_bdlora": _MERGE,
    "velora_config": _MERGE,
    "monteclora_config": _MERGE,
    "kasa_config": _MERGE,
    "megatron_config": _MERGE,
    "loftq_config": _MERGE,
    "corda_config": _MERGE,
    "lora_ga_config": _MERGE,
}
_BIASES = ("none", "all", "lora_only")
# Initialisations that do not change the base's weights; the others subtract from them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

# End of a key -> kind of tensor; the longest match counts. The rest of the key is the module's
# path.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "token_rows",
    "base_layer.weight": "base.weight",
    "base_layer.bias": "base.bias",
    "original_module.weight": "base.weight",
    "weight": "weight",
    "bias": "bias",
}
_FACTORS = ("a", "b", "b_bias", "magnitude")
Parts = dict[str, FileTensor]


def open_peft(source: Source, base: Base, place: str, reading: Reading) -> Adapter:
    """Read one adapter's headers against `base`; no weight is read.

    Raises SourceError for damage, UnsupportedError for an unsupported kind, AdapterError for a
    tensor that belongs to no module.
    """
    folder = source.folder
    check_is_adapter(place, folder)
    config = read_json(folder / CONFIG)
    check_adapter_config(f"{place}: {CONFIG}", config)
    check_type(place, config)
    weights = stored_weights(place, folder, reading)
    if config.get("peft_type") in PROMPTS:
        return open_prompt(place, source.spec, folder, config, base, weights)
    if config.get("peft_type") != "LORA":
        return open_tuned(place, source.spec, folder, config, base, weights)
    check_config(place, config)
    keys = read_keys(place, weights.tensors, base)
    parts = _sort_tensors(place, keys.tensors)
    rank_and_scale = _by_written_path(keys.written)
    inside, parts = take_parameters(place, config, base, parts, rank_and_scale)
    single, parts, noted = take_experts(place, config, base, parts, rank_and_scale)
    parts = _attention_paths(base, parts)
    sites = {path: base.architecture.site_of(path) for path in sorted(parts)}
    whole = [
        r for path, site in sites.items() for r in _replacements(place, config, site, parts[path])
    ]
    added = added_rows(place, folder, base)
    fused = {path: _FUSED for path in sites if f"{path}.{_FUSED}" in base.tensors}
    deltas = [
        _as_attention_runs(base, delta)
        for path, site in sites.items()
        for delta in _deltas(
            place, config, site, parts[path], rank_and_scale, fused.get(path, "weight")
        )
    ]
    return Adapter(
        name=place,
        spec=source.spec,
        folder=folder,
        files=(folder / CONFIG, *weights.files, *((folder / ROWS,) if added else ())),
        config=config,
        deltas=tuple(sorted(inside + single + deltas, key=lambda d: (d.site.order, d.parameter))),
        replacements=(*whole, *added),
        notes=(*keys.notes, *noted, *weights.notes, *(_added_rows_note(added))),
        foreign=bool(keys.notes or noted or added) or not weights.usual,
        metadata=weights.metadata,
        written=keys.written,
    )


def _added_rows_note(added: list[Replacement]) -> tuple[str, ...]:
    """A note on the file of added rows, which PEFT does not read."""
    names = ", ".join(saved.site.path for saved in added)
    return (f"{ROWS}: rows of added tokens behind those of {names}",) if added else ()


def _by_written_path(written: Mapping[str, str]) -> RankAndScale:
    """`rank_and_scale` by a module's path in the file, which the config's patterns match."""

    def by_written_path(place: str, path: str, config: Mapping[str, Any]) -> tuple[int, float]:
        return rank_and_scale(place, written.get(path, path), config)

    return by_written_path


def check_type(place: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that does not say what kind of adapter it is."""
    if not config.get("peft_type"):
        raise SourceError(
            f"{place}: {CONFIG}", "no peft_type" if config else "an empty object", "PEFT's config",
            "rank and scale stand there; save the adapter with save_pretrained",
        )  # fmt: skip


def check_config(place: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for the first field of `config_problems`."""
    for problem in config_problems(place, config):
        raise problem


def config_problems(place: str, config: Mapping[str, Any]) -> Iterator[UnsupportedError]:
    """An error for every field of the config that the merge does not support."""
    if config.get("peft_type") != "LORA":
        return  # the tuner's row in `tuners.py` decides; see `tuned_adapter.py`
    for key, value in sorted(config.items()):
        if key in _OBEYED or key in _HARMLESS or value in (None, False, {}, []):
            continue
        if key == "bias" and value in _BIASES:
            continue
        if key == "init_lora_weights" and value in _PLAIN_INITS:
            continue
        yield _refusal(place, key, value, config)


def _refusal(place: str, key: str, value: Any, config: Mapping[str, Any]) -> UnsupportedError:
    """The error for a field that is unsupported or unknown."""
    problem = f"{key} = {value!r}"
    if key in _REFUSED:
        expected, remedy = "plain LoRA", _REFUSED[key]
    else:
        written = config.get("peft_version")
        by = f", written by PEFT {written}" if written else ""
        problem += f", a field that is not known here{by}"
        expected = "the fields of PEFT 0.21's LoraConfig"
        remedy = "if it only concerns training, take it out there; else merge with that PEFT"
    return UnsupportedError(f"{place}: {CONFIG}", problem, expected, remedy)


def _sort_tensors(place: str, stored: tuple[FileTensor, ...]) -> dict[str, Parts]:
    """Module path -> kind of tensor -> the file's tensor."""
    sorted_: dict[str, Parts] = {}
    for tensor in stored:
        if not tensor.name.startswith(PREFIX):
            raise _unknown(place, tensor.name, f"a key that starts with {PREFIX!r}")
        words = tensor.name.removeprefix(PREFIX).split(".")
        for cut in range(1, len(words)):
            part = _PARTS.get(".".join(words[cut:]))
            if part is not None:
                break
        else:
            raise _unknown(place, tensor.name, "lora_A.weight, lora_B.weight or modules_to_save")
        path = ".".join(words[:cut])
        known = sorted_.setdefault(path, {}).setdefault(part, tensor)
        if known is not tensor:
            raise AdapterError(
                f"{place}: {path}", f"{known.name} and {tensor.name}", "one of the two",
                "they hold the same part of one module; save the adapter again",
            )  # fmt: skip
    return sorted_


def _replacements(
    place: str, config: Mapping[str, Any], site: Site, parts: Parts
) -> list[Replacement]:
    """The tensors of one module that replace the base's: saved modules, trained biases and rows."""
    replacements = []
    for kind in ("weight", "bias"):
        if tensor := parts.get(f"base.{kind}"):
            replacements.append(Replacement(site, kind, tensor, shared=True))
        if not (tensor := parts.get(kind)):
            continue
        own = saved_by(site.path, config.get("modules_to_save")) is not None
        trained_bias = kind == "bias" and config.get("bias", "none") != "none"
        if not (own or trained_bias or _is_vocabulary(tensor, site)):
            raise _unknown(place, tensor.name, "a module in modules_to_save")
        replacements.append(Replacement(site, kind, tensor, shared=not own))
    if tensor := parts.get("token_rows"):
        rows = _token_rows(place, config, site)
        replacements.append(Replacement(site, "weight", tensor, shared=True, rows=rows))
    return replacements


def _is_vocabulary(tensor: FileTensor, site: Site) -> bool:
    """PEFT saves embedding and head whole when it resized or targets them."""
    return site.layer is None and len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _token_rows(place: str, config: Mapping[str, Any], site: Site) -> tuple[int, ...]:
    """The rows that `trainable_token_indices` names for this module."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        names = [n for n in indices if site.path == n or site.path.endswith("." + n)]
        indices = indices[names[0]] if len(names) == 1 else None
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise AdapterError(
            f"{place}: {site.path}", f"trainable_token_indices = {indices!r}", "a list of rows"
        )
    return tuple(indices)


def _unknown(place: str, key: str, expected: str) -> AdapterError:
    return AdapterError(
        f"{place}: {key}", "a tensor that belongs to no site", expected,
        "PEFT would drop it in silence; was the file renamed or saved by another tool?",
    )  # fmt: skip


_FUSED = "in_proj_weight"  # what MultiheadAttention stores q, k and v in


def _attention_paths(base: Base, parts: dict[str, Parts]) -> dict[str, Parts]:
    """PEFT keeps the output projection of a MultiheadAttention inside its own layer:
    `attn.base_layer.out_proj` is the base's `attn.out_proj`."""
    inner = ".base_layer.out_proj"
    return {
        path.removesuffix(inner) + ".out_proj"
        if path.endswith(inner) and f"{path.removesuffix(inner)}.{_FUSED}" in base.tensors
        else path: tensors
        for path, tensors in parts.items()
    }


def _as_attention_runs(base: Base, delta: Delta) -> Delta:
    """Double the delta of a MultiheadAttention's output projection, as PEFT does.

    Its layer merges that projection twice whenever it runs, in training as well (`merge` of PEFT
    0.21, with and without `safe_merge`).
    """
    owner, _, last = delta.site.path.rpartition(".")
    if last != "out_proj" or f"{owner}.{_FUSED}" not in base.tensors:
        return delta
    doubled = (replace(t, scale=2 * t.scale) for t in low_ranks(delta.terms))
    return replace(delta, terms=tuple(doubled))


def _deltas(
    place: str,
    config: Mapping[str, Any],
    site: Site,
    parts: Parts,
    rank_and_scale: RankAndScale,
    weight: str = "weight",
) -> list[Delta]:
    """What the factors in the file add to one module's weight and bias."""
    if not any(part in parts for part in _FACTORS):
        return []
    path = site.path
    if "a" not in parts or "b" not in parts:
        missing = "lora_B" if "a" in parts else "lora_A"
        raise AdapterError(f"{place}: {path}", f"no {missing}", "both factors", "save it again")
    a: Tensor = parts["a"]
    b: Tensor = parts["b"]
    rank, scale = rank_and_scale(place, path, config)
    if len(a.shape) == len(b.shape) == 2:
        a, b = orient_factors(a, b, rank)
    else:
        a, b = _convolution_factors(place, path, parts, rank)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{place}: {path}", f"rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B",
            f"{rank} by {CONFIG}", "the config belongs to other weights",
        )  # fmt: skip
    _check_flag(place, path, config, "use_dora", "magnitude" in parts)
    _check_flag(place, path, config, "lora_bias", "b_bias" in parts)
    deltas = []
    if "magnitude" in parts:
        deltas.append(Delta(site, (Dora(a, b, scale, parts["magnitude"]),)))
    else:
        deltas.append(Delta(site, (LowRank(a, b, scale),), weight))
    if "b_bias" in parts:
        if "magnitude" in parts:
            raise UnsupportedError(
                f"{place}: {path}", "lora_bias with use_dora", "one of them",
                "DoRA scales the bias of lora_B by a norm; train without lora_bias",
            )  # fmt: skip
        deltas.append(Delta(site, (Scaled(parts["b_bias"], scale),), "bias"))
    return deltas


def _convolution_factors(place: str, path: str, parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (r, in, k...) and (out, r, 1...) as matrices, whose product, reshaped to the
    kernel, is what PEFT adds. Raises UnsupportedError for DoRA and for groups."""
    a, b = parts["a"], parts["b"]
    plain = len(a.shape) == len(b.shape) and b.shape[1:] == (rank, *(1,) * (len(b.shape) - 2))
    if not plain or "magnitude" in parts:
        problem = "DoRA" if plain else f"factors of shape {a.shape} and {b.shape}"
        raise UnsupportedError(
            f"{place}: {path}", f"{problem} on a convolution", "plain LoRA, one group",
            "merge this adapter with PEFT and build the merged model",
        )  # fmt: skip
    return Flattened(a), Flattened(b)


def _check_flag(
    place: str, path: str, config: Mapping[str, Any], field: str, shipped: bool
) -> None:
    """Refuse a tensor without its config field, and the field without its tensor."""
    if shipped != bool(config.get(field)):
        problem = "a tensor for it" if shipped else "no tensor for it"
        raise AdapterError(
            f"{place}: {path}", f"{field} = {config.get(field)!r} and {problem}", "both or neither",
            "the config belongs to other weights",
        )  # fmt: skip


def rank_and_scale(place: str, path: str, config: Mapping[str, Any]) -> tuple[int, float]:
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
        matched = ends_with(pattern, path)
        if matched is None:
            matched = search(f"{place}: {CONFIG}", regex.match, r"(.*\.)?(%s)$", pattern, path)
        if matched:
            return value
    return default
