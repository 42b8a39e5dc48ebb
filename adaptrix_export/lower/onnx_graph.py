"""Front ends: a plan in, an ONNX graph out whose weights are expressions, not values.

`native` builds the graph with mobius-onnx, whose modules are written for ONNX Runtime's fused
operators. It is exact for some model types and wrong for others; nothing here trusts it, and the
parity check that follows every build decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.task import FEATURES, GENERATION
from adaptrix_export.lower.weights import Expression, names
from adaptrix_export.plan import Plan

# What mobius-onnx can build here: for encoders only the types that were measured to be exact.
TASKS: dict[str, tuple[str, ...] | None] = {GENERATION: None, FEATURES: ("bert",)}


@dataclass(frozen=True)
class Graph:
    """`weights`: initializer name -> expression over base tensor names, for every initializer
    that has no constant value. `unused`: base tensors that the graph does not read."""

    model: ir.Model
    weights: Mapping[str, Expression]
    frontend: str
    unused: tuple[str, ...]


def native(plan: Plan, provider: str) -> Graph:
    """The graph that mobius-onnx builds for `provider`, in float32.

    Raises UnsupportedError when mobius does not know the model type, computes weights in a way
    that cannot be recorded, or leaves an initializer or a changed tensor without its match.
    """
    import mobius

    kind = plan.base.architecture.model_type
    if kind not in mobius.registry:
        raise UnsupportedError(
            f"{plan.base.spec}: model type {kind!r}", "no native front end", "a registered type",
            "use --target safetensors",
        )  # fmt: skip
    _check_task(plan)
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
        name: bound[name].expression
        for name, value in model.graph.initializers.items()
        if value.const_value is None and name in bound
    }
    _check_bound(plan, model, weights)
    share_equal(model, weights)
    fold(model, weights)
    read = {n for e in weights.values() for n in names(e)}
    return Graph(model, weights, "native", tuple(n for n in plan.base.tensors if n not in read))


def _check_task(plan: Plan) -> None:
    task, kind = plan.base.task, plan.base.architecture.model_type
    kinds = TASKS.get(task, ())
    if kinds is not None and kind not in kinds:
        raise UnsupportedError(
            f"{plan.base.spec}: task {task} of model type {kind!r}", "no native front end",
            " or ".join(TASKS), "use --target safetensors",
        )  # fmt: skip


def _native_module(plan: Plan, module_class: Any) -> tuple[Any, Any]:
    """The mobius module and its config, made from the base's config.json."""
    import dataclasses

    from mobius._config_resolver import _config_from_hf
    from transformers import AutoConfig

    config = {k: v for k, v in plan.base.config.items() if k not in ("dtype", "torch_dtype")}
    config["tie_word_embeddings"] = bool(plan.base.tied)
    config.update(plan.config_changes())
    hf_config = AutoConfig.for_model(**config)
    resolved = _config_from_hf(hf_config, module_class=module_class)
    resolved = dataclasses.replace(resolved, dtype=ir.DataType.FLOAT)
    return module_class(resolved), resolved


@contextmanager
def _native_faults(plan: Plan) -> Iterator[None]:
    """What mobius raises for a config it cannot build, as a refusal that names the model type."""
    from adaptrix_export.errors import AdaptrixError

    try:
        yield
    except AdaptrixError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{plan.base.spec}: model type {plan.base.architecture.model_type!r}",
            f"mobius-onnx cannot build it ({type(error).__name__}: {error})", "a supported config",
            "use --target safetensors",
        ) from error  # fmt: skip


def _recorded(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Every base tensor as a shape that records, merged shapes where a replacement changes one."""
    from adaptrix_export.lower.recorder import Recorded
    from adaptrix_export.lower.weights import tensor

    changes, untied = plan.changes(), plan.untied()
    for name, stored in plan.base.tensors.items():
        if name in plan.base.tied and name not in untied:
            continue  # shared: the front end takes the embedding
        yield name, Recorded(changes[name].shape if name in changes else stored.shape, tensor(name))
    for name in untied:
        if name not in plan.base.tensors:
            shared = plan.base.tensors[plan.base.tied[name]]
            shape = changes[name].shape if name in changes else shared.shape
            yield name, Recorded(shape, tensor(name))


def _check_bound(plan: Plan, model: ir.Model, weights: Mapping[str, Expression]) -> None:
    """Every initializer has its tensors, of its shape; every changed tensor has its initializer."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None and name not in weights:
            raise UnsupportedError(
                f"native front end: {name}", "an initializer without a tensor in the base",
                "one for each", "is the checkpoint complete?",
            )  # fmt: skip
    read = {n for e in weights.values() for n in names(e)}
    lost = sorted(n for n in set(plan.changes()) - read if not _is_beyond(plan, n))
    if lost:
        raise UnsupportedError(
            f"native front end: {lost[0]}", "a changed tensor that the graph does not read",
            "every change in the graph", f"{len(lost)} such tensors; use --target safetensors",
        )  # fmt: skip


def _is_beyond(plan: Plan, name: str) -> bool:
    """A change behind the output: features are the last hidden states, which no pooler touches."""
    return plan.base.task == FEATURES and name.startswith("pooler.")


def share_equal(model: ir.Model, weights: dict[str, Expression]) -> int:
    """One initializer for equal expressions (a tied head); returns how many were dropped."""
    first: dict[str, ir.Value] = {}
    dropped = 0
    for name in list(weights):
        value = model.graph.initializers[name]
        kept = first.setdefault(repr(weights[name]), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name], weights[name]
            dropped += 1
    return dropped


def fold(model: ir.Model, weights: dict[str, Expression]) -> int:
    """Move Transpose and Concat of weights out of the graph, into the expressions.

    Only where the weight has no other reader: a tied embedding is read as it is, too, and
    ONNX Runtime transposes that one itself. Returns the number of nodes folded.
    """
    folded = 0
    for node in list(model.graph):
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type not in _FOLDS or node.domain or not inputs:
            continue
        if any(v.name not in weights or len(list(v.uses())) != 1 for v in inputs):
            continue
        output = node.outputs[0]
        assert output.name is not None
        expressions = [weights.pop(str(v.name)) for v in inputs]
        weights[output.name] = _FOLDS[node.op_type](node, expressions)
        _replace_by_initializer(model, node, output)
        folded += 1
    return folded


_FOLDS: dict[str, Callable[[ir.Node, list[Expression]], Expression]] = {
    "Transpose": lambda node, e: ["transpose", list(node.attributes["perm"].as_ints()), e[0]],
    "Concat": lambda node, e: ["concat", node.attributes["axis"].as_int(), e],
}


def _replace_by_initializer(model: ir.Model, node: ir.Node, output: ir.Value) -> None:
    """Take `node` out of the graph; its output becomes an initializer of the same name."""
    graph = model.graph
    sources = [v for v in node.inputs if v is not None]
    dtype, name = sources[0].dtype, output.name
    shape = _folded_shape(node, [v.shape for v in sources if v.shape is not None])
    made = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype or ir.DataType.FLOAT))
    output.name = f"{name}.folded"
    output.replace_all_uses_with(made)
    graph.remove(node, safe=True)
    for source in sources:
        del graph.initializers[str(source.name)]
    graph.initializers[str(name)] = made


def _folded_shape(node: ir.Node, shapes: list[ir.Shape]) -> ir.Shape:
    if node.op_type == "Transpose":
        return ir.Shape([shapes[0][d] for d in node.attributes["perm"].as_ints()])
    axis = node.attributes["axis"].as_int()
    dims = list(shapes[0])
    lengths = [s[axis] for s in shapes]
    dims[axis] = sum(n for n in lengths if isinstance(n, int))  # a weight has no symbolic sizes
    return ir.Shape(dims)
