"""Front end `native`: mobius-onnx, whose modules are written for ONNX Runtime's fused operators.

It takes seconds, is exact for some model types and wrong for others. Graphs that are wrong only for
padded batches are corrected here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from adaptrix_export.arch.tasks import FEATURES, GENERATION
from adaptrix_export.compat.mobius import module_config
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression, TensorRef
from adaptrix_export.graph.frontends.faults import REMEDIES, raised_by
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.fold import fold, share_equal
from adaptrix_export.graph.rewrite.key_mask import wire_key_mask
from adaptrix_export.graph.rewrite.padding import needs_left_padding, wire_left_padding
from adaptrix_export.plan import Plan

# What mobius-onnx can build here: encoders are tried by the type that was measured to be exact.
TASKS: dict[str, tuple[str, ...] | None] = {GENERATION: None, FEATURES: ("bert",)}
REMEDY = REMEDIES["native"]


def native(plan: Plan, provider: str) -> Graph:
    """The graph that mobius-onnx builds for `provider`, in float32.

    Raises UnsupportedError when mobius does not know the model type, computes weights in a way
    that cannot be recorded, or leaves an initializer or a changed tensor without its match.
    """
    import mobius

    check_known(plan)
    kind = plan.base.architecture.model_type
    with _native_faults(plan):
        module, config = _native_module(plan, mobius.registry.get(kind))
        package = mobius.build_from_module(
            module, config, plan.base.task, execution_provider=provider
        )
        bound = module.preprocess_weights(dict(_recorded(plan)))
    if set(package) != {"model"}:
        raise UnsupportedError(kind, f"components {sorted(package)}", "one graph")
    model = package["model"]
    weights = {
        name: _expression(plan, name, bound[name])
        for name, value in model.graph.initializers.items()
        if value.const_value is None and name in bound
    }
    _check_bound(plan, model, weights)
    share_equal(model, weights)
    fold(model, weights)
    if needs_left_padding(model):
        wire_left_padding(model)
    if plan.base.task == FEATURES:
        wire_key_mask(model)
    read = {n for e in weights.values() for n in e.names()}
    return Graph(model, weights, "native", tuple(n for n in plan.base.tensors if n not in read))


def _expression(plan: Plan, name: str, weight: Any) -> Expression:
    """What mobius-onnx makes a weight of; some (alibi's slopes) it computes from no tensor."""
    from adaptrix_export.graph.frontends.recorder import Recorded

    if not isinstance(weight, Recorded):
        raise UnsupportedError(
            f"{plan.base.spec}: {name}", "a weight that mobius-onnx computes by itself",
            "one that follows from the base's tensors", REMEDY,
        )  # fmt: skip
    return weight.expression


def check_known(plan: Plan) -> None:
    """Raise UnsupportedError where mobius-onnx has no model for the type and the task."""
    import mobius

    task, kind = plan.base.task, plan.base.architecture.model_type
    if kind not in mobius.registry:
        raise UnsupportedError(
            f"{plan.base.spec}: model type {kind!r}", "no native front end", "a registered type",
            REMEDY,
        )  # fmt: skip
    kinds = TASKS.get(task, ())
    if kinds is not None and kind not in kinds:
        raise UnsupportedError(
            f"{plan.base.spec}: task {task} of model type {kind!r}", "no native front end",
            " or ".join(TASKS), REMEDY,
        )  # fmt: skip


def _native_module(plan: Plan, module_class: Any) -> tuple[Any, Any]:
    """The mobius module and its config, made from the base's config.json."""
    import dataclasses

    resolved = module_config(live_config(plan), module_class)
    resolved = dataclasses.replace(resolved, dtype=ir.DataType.FLOAT)
    return module_class(resolved), resolved


@contextmanager
def _native_faults(plan: Plan) -> Iterator[None]:
    """Turn what mobius raises for a config that it cannot build into an UnsupportedError.

    Exceptions raised by code of this package are not converted: they are bugs.
    """
    from adaptrix_export.errors import AdaptrixError

    try:
        yield
    except AdaptrixError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        if raised_by(error) is None:
            raise
        raise UnsupportedError(
            f"{plan.base.spec}: model type {plan.base.architecture.model_type!r}",
            f"mobius-onnx cannot build it ({type(error).__name__}: {error})", "a supported config",
            REMEDY,
        ) from error  # fmt: skip


def _recorded(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Every base tensor as a `Recorded` tensor, of its merged shape if a replacement changes it."""
    from adaptrix_export.graph.frontends.recorder import Recorded

    changes, untied = plan.changes(), plan.untied()
    for name, stored in plan.base.tensors.items():
        if name in plan.base.tied and name not in untied:
            continue  # tied: the front end reads the embedding
        shape = changes[name].shape if name in changes else stored.shape
        yield name, Recorded(shape, TensorRef(name))
    for name in untied:
        if name not in plan.base.tensors:
            shared = plan.base.tensors[plan.base.tied[name]]
            shape = changes[name].shape if name in changes else shared.shape
            yield name, Recorded(shape, TensorRef(name))


def _check_bound(plan: Plan, model: ir.Model, weights: Mapping[str, Expression]) -> None:
    """Refuse an initializer without tensors, and a changed tensor that no initializer reads."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None and name not in weights:
            raise UnsupportedError(
                f"native front end: {name}", "an initializer without a tensor in the base",
                "one for each", "is the checkpoint complete?",
            )  # fmt: skip
    read = {n for e in weights.values() for n in e.names()}
    lost = sorted(n for n in set(plan.changes()) - read if not _is_beyond(plan, n))
    if lost:
        raise UnsupportedError(
            f"native front end: {lost[0]}", "a changed tensor that the graph does not read",
            "every change in the graph", f"{len(lost)} such tensors; {REMEDY}",
        )  # fmt: skip


def _is_beyond(plan: Plan, name: str) -> bool:
    """Whether the change lies behind the graph's output: features are read before the pooler."""
    return plan.base.task == FEATURES and name.startswith("pooler.")
