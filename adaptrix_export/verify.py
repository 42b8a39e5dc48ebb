"""What holds of every plan, checked on headers before a weight is read and after every pass."""

from __future__ import annotations

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.tensors import FLOATS
from adaptrix_export.plan import Adapter, Base, Delta, Plan, Replacement


def verify(plan: Plan) -> Plan:
    """Return the plan, or raise AdapterError or UnsupportedError at the first thing wrong.

    Every site exists in the base; every shape fits; nothing is replaced twice; what is added to
    is a float tensor.
    """
    for adapter in plan.adapters:
        if not adapter.deltas and not adapter.replacements:
            raise AdapterError(
                adapter.name, "no tensors", "at least one site",
                "was the adapter saved with another name active?",
            )  # fmt: skip
        for delta in adapter.deltas:
            _check_delta(plan.base, adapter, delta)
        for saved in adapter.replacements:
            _check_replacement(plan.base, adapter, saved)
    _check_conflicts(plan)
    return plan


def _stored(base: Base, adapter: Adapter, path: str, parameter: str) -> tuple[int, ...]:
    """Shape of the base's parameter, or the error that it is missing."""
    name = f"{path}.{parameter}"
    tensor = base.tensors.get(base.tied.get(name, name))
    if tensor is None:
        raise AdapterError(
            f"{adapter.name}: {path}", f"no {parameter} in the base", "a module of the base",
            "was this adapter trained on another model?",
        )  # fmt: skip
    if tensor.dtype not in FLOATS:
        raise UnsupportedError(f"{path}.{parameter}", f"dtype {tensor.dtype}", " ".join(FLOATS))
    return tensor.shape


def _check_delta(base: Base, adapter: Adapter, delta: Delta) -> None:
    path = delta.site.path
    shape = _stored(base, adapter, path, "weight")
    if len(shape) != 2:
        raise UnsupportedError(f"{adapter.name}: {path}", f"a weight of shape {shape}", "a matrix")
    outputs, inputs = reversed(shape) if base.architecture.is_transposed(delta.site) else shape
    for term in delta.terms:
        for factor, columns, expected in (
            ("lora_A", term.a.shape[1], inputs),
            ("lora_B", term.b.shape[0], outputs),
        ):
            if columns != expected:
                axis = "columns" if factor == "lora_A" else "rows"
                raise AdapterError(
                    f"{adapter.name}: {path}", f"{factor} with {columns} {axis}",
                    f"{expected} as in the base", "was this adapter trained on another model?",
                )  # fmt: skip
        for tensor in (term.a, term.b):
            if tensor.dtype not in FLOATS:
                raise UnsupportedError(
                    f"{adapter.name}: {tensor.name}", f"dtype {tensor.dtype}", " ".join(FLOATS)
                )


def _check_replacement(base: Base, adapter: Adapter, saved: Replacement) -> None:
    path = saved.site.path
    shape = _stored(base, adapter, path, saved.parameter)
    if saved.tensor.shape != shape:
        raise AdapterError(
            f"{adapter.name}: {path}.{saved.parameter}", f"shape {list(saved.tensor.shape)}",
            f"{list(shape)} as in the base", "a resized vocabulary cannot be built yet",
        )  # fmt: skip


def _check_conflicts(plan: Plan) -> None:
    """A replaced parameter belongs to one adapter alone: a sum of two makes no sense."""
    owner: dict[str, str] = {}
    for adapter in plan.adapters:
        for saved in adapter.replacements:
            name = f"{saved.site.path}.{saved.parameter}"
            if owner.setdefault(name, adapter.name) != adapter.name:
                raise AdapterError(
                    name, f"replaced by {owner[name]} and by {adapter.name}", "one of them",
                    "build with one of the two adapters",
                )  # fmt: skip
    names = [adapter.name for adapter in plan.adapters]
    if len(set(names)) != len(names):
        raise AdapterError("adapters", f"names {', '.join(names)}", "each once", "name them apart")
