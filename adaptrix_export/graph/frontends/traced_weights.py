"""Bind the initializers of a traced graph, which are named as the model's parameters."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression, TensorRef
from adaptrix_export.plan import Plan


def bind(plan: Plan, model: ir.Model, parameters: Set[str]) -> dict[str, Expression]:
    """Initializer name -> expression, for every parameter and every buffer that the base stores.

    Their constant values are removed from the graph. An integer buffer (a BERT checkpoint may store
    its position ids) keeps the values that the model computes for it.
    Raises UnsupportedError for a parameter without a tensor of its shape in the base, for a change
    that is not read, and for stored integers that are not those of the graph.
    """
    weights: dict[str, Expression] = {}
    for name, value in model.graph.initializers.items():
        source = _source(plan, name)
        if source is None and name in parameters:
            raise UnsupportedError(
                f"traced front end: {name}", "a parameter without a tensor in the base",
                "one for each", "is the checkpoint complete?",
            )  # fmt: skip
        if source is None or not value.uses():
            continue
        _check_shape(plan, name, source, value)
        if value.dtype is not None and not value.dtype.is_floating_point():
            _check_integers(plan, name, source, value)
            continue
        weights[name] = TensorRef(source)
        value.const_value = None
    return weights


def _check_integers(plan: Plan, name: str, source: str, value: ir.Value) -> None:
    stored = plan.base.tensors[plan.base.tied.get(source, source)]
    computed = value.const_value
    if computed is None or not np.array_equal(computed.numpy(), stored.read()):
        raise UnsupportedError(
            f"traced front end: {name}", f"{stored.dtype} values that the model does not compute",
            "those that it computes", "save the base without this buffer",
        )  # fmt: skip


def _source(plan: Plan, name: str) -> str | None:
    """The tensor of the base, or of the adapter, that a parameter takes its values from."""
    base = plan.base
    if name in base.tied and name not in plan.untied():
        return base.tied[name]
    known = name in base.tensors or name in base.tied or name in plan.changes()
    return name if known else None


def _check_shape(plan: Plan, name: str, source: str, value: ir.Value) -> None:
    change = plan.changes().get(source)
    stored = plan.base.tensors.get(plan.base.tied.get(source, source))
    shape = change.shape if change else stored.shape if stored else None
    traced_shape = value.shape.numpy() if value.shape is not None else None
    if shape is None or traced_shape is None or tuple(shape) != tuple(traced_shape):
        raise UnsupportedError(
            f"traced front end: {name}", f"a parameter of shape {traced_shape}",
            f"{shape} as the base has it", "does the checkpoint fit its config.json?",
        )  # fmt: skip
