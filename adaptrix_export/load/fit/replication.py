"""`layer_replication`: repeats layers of the base, as PEFT does before it adds adapters.

`[[0, 3], [1, 4]]` means layers 0 1 2 1 2 3. In PEFT's live model the repeated layers share the
base's weights and have their own LoRA; merged, each needs its own tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adaptrix_export.arch.architecture import Stack, split_path
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.plan import Base, Plan

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def repeat_layers(plan: Plan) -> Plan:
    """The plan on a base with repeated layers, if an adapter requires it; else unchanged."""
    replications = {str(a.config.get("layer_replication") or "") for a in plan.adapters}
    if replications == {""}:
        return plan
    adapter = plan.adapters[0]
    if len(replications) > 1:
        raise AdapterError(
            "layer_replication", f"{len(replications)} different ones", "the same in all adapters",
            "build them one by one",
        )  # fmt: skip
    order = _order(adapter.name, plan.base, adapter.config["layer_replication"])
    return replace(plan, base=_repeat(plan.base, order))


def _order(place: str, base: Base, ranges: Any) -> list[int]:
    """New layer -> the base's layer that it repeats."""
    count = base.architecture.stacks[0].count if base.architecture.stacks else 0
    order: list[int] = []
    for entry in ranges:
        pair = list(entry) if isinstance(entry, (list, tuple)) else []
        if len(pair) != 2 or not all(type(n) is int and 0 <= n <= count for n in pair):
            raise AdapterError(
                f"{place}: layer_replication", repr(entry), f"[start, stop] within 0 and {count}"
            )
        order += range(*pair)
    return order


def _repeat(base: Base, order: list[int]) -> Base:
    stack = base.architecture.stacks[0]
    new_places: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        new_places.setdefault(old, []).append(new)
    tensors = {}
    for name, tensor in base.tensors.items():
        prefix, layer, rest = split_path(name)
        if prefix != stack.prefix or layer is None:
            tensors[name] = tensor
            continue
        for new in new_places.get(layer, []):
            tensors[f"{prefix}.{new}.{rest}"] = tensor
    stacks = (Stack(stack.prefix, len(order)), *base.architecture.stacks[1:])
    return replace(
        base,
        tensors=tensors,
        architecture=replace(base.architecture, stacks=stacks),
        rebuilt=True,
        config_changes={**base.config_changes, **_config(base, order)},
    )


def _config(base: Base, order: list[int]) -> dict[str, Any]:
    count = base.architecture.stacks[0].count
    key = next((k for k in _COUNTS if base.config.get(k) == count), None)
    if key is None:
        raise UnsupportedError(
            f"{base.spec}: config.json", f"no layer count of {count}", " or ".join(_COUNTS),
            "layer_replication cannot be built for this model type",
        )  # fmt: skip
    lists = {k: base.config[k] for k in _PER_LAYER if isinstance(base.config.get(k), list)}
    return {key: len(order), **{k: [v[i] for i in order] for k, v in lists.items()}}
