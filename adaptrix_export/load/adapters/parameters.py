"""LoRA on parameters (`target_parameters`), mostly on the stacked experts of a mixture.

PEFT wraps the module once for each parameter, in the module's order of parameters, and each wrapper
wraps the previous one. So the factors of the last parameter are saved as
`...experts.lora_A.weight`, those of the one before as `...experts.base_layer.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.files.views import FileTensor
from adaptrix_export.load.quantized.experts import FUSIONS, fusion_of
from adaptrix_export.plan import Base, Delta, Experts

Parts = dict[str, FileTensor]
RankAndScale = Callable[[str, str, Mapping[str, Any]], tuple[int, float]]
WRAPPER = ".base_layer"


def take_parameters(
    place: str,
    config: Mapping[str, Any],
    base: Base,
    parts: Mapping[str, Parts],
    rank_and_scale: RankAndScale,
) -> tuple[list[Delta], dict[str, Parts]]:
    """(deltas of all targeted parameters, the other entries of `parts`).

    Raises AdapterError if the number of wrappers in the file is not that of the config's targets.
    """
    targets = tuple(config.get("target_parameters") or ())
    wrapped: dict[str, dict[int, Parts]] = {}
    left: dict[str, Parts] = {}
    for path, tensors in parts.items():
        module, depth = path, 0
        while targets and module.endswith(WRAPPER):
            module, depth = module.removesuffix(WRAPPER), depth + 1
        if targets and _targeted(base, module, targets) and {"a", "b"} & set(tensors):
            wrapped.setdefault(module, {})[depth] = tensors
        else:
            left[path] = tensors
    deltas = []
    for module, by_depth in wrapped.items():
        names = _targeted(base, module, targets)
        if sorted(by_depth) != list(range(len(names))):
            raise AdapterError(
                f"{place}: {module}", f"{len(by_depth)} pairs of factors",
                f"one for each of {', '.join(names)}", "target_parameters names other parameters",
            )  # fmt: skip
        for depth, tensors in by_depth.items():
            parameter = names[len(names) - 1 - depth]
            deltas.append(_delta(place, config, base, (module, parameter), tensors, rank_and_scale))
    return deltas, left


def _targeted(base: Base, module: str, targets: tuple[str, ...]) -> list[str]:
    """The parameters of a module that PEFT would wrap, in its order."""
    fusion = fusion_of(base.architecture.model_type)
    order = (*(fusion.parameters if fusion else ()), "weight", "bias")
    names = [f"{module}.{parameter}" for parameter in order]
    ends = tuple(f".{target}" for target in targets)
    return [
        name.rpartition(".")[2]
        for name in names
        if (base.tied.get(name, name) in base.tensors) and (name in targets or name.endswith(ends))
    ]


def _delta(
    place: str,
    config: Mapping[str, Any],
    base: Base,
    target: tuple[str, str],
    tensors: Parts,
    rank_and_scale: RankAndScale,
) -> Delta:
    module, parameter = target
    name = f"{module}.{parameter}"
    stored = base.tensors[base.tied.get(name, name)]
    if set(tensors) != {"a", "b"}:
        raise AdapterError(
            f"{place}: {name}", f"parts {', '.join(sorted(tensors))}", "lora_A and lora_B",
            "save the adapter again",
        )  # fmt: skip
    fusion = fusion_of(base.architecture.model_type)
    if len(stored.shape) == 3 and fusion is None:
        raise UnsupportedError(
            f"{place}: {name}", f"experts of model type {base.architecture.model_type!r}",
            ", ".join(sorted(FUSIONS)), "how this type lays out its experts is not known here",
        )  # fmt: skip
    if len(stored.shape) not in (2, 3):
        raise UnsupportedError(f"{place}: {name}", f"shape {list(stored.shape)}", "a matrix")
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    rank, scale = rank_and_scale(place, name, config)
    a, b = tensors["a"], tensors["b"]
    if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank * experts,) * 2:
        raise AdapterError(
            f"{place}: {name}", f"factors of shape {list(a.shape)} and {list(b.shape)}",
            f"rank {rank} for each of {experts}", "the config belongs to other weights",
        )  # fmt: skip
    turned = len(stored.shape) == 3 and fusion is not None and fusion.turned
    term = Experts(a, b, scale, experts, turned)
    return Delta(base.architecture.site_of(module), (term,), parameter)
