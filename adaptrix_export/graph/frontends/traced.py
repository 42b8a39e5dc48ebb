"""Front end `traced`: the transformers model, traced by torch.export.

It covers model types that `native` does not, and takes minutes instead of seconds. The model is
built without weights (`weightless.py`), so no weight becomes a constant of the graph: each
parameter stays an initializer of the same name, which is bound to the base's tensor of that name.
One graph serves prefill and decode: any number of tokens after a cache that may be empty.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Set
from typing import Any

import onnx_ir as ir

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.compat.onnxscript import exactly_matched
from adaptrix_export.compat.transformers_tracing import traceable
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.graph.frontends.faults import raised_by
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.graph.frontends.traced_interface import OUTPUTS, name_interface
from adaptrix_export.graph.frontends.traced_sample import Sample, sample_of
from adaptrix_export.graph.frontends.traced_weights import bind
from adaptrix_export.graph.frontends.weightless import stored_parameters, weightless
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.fold import fold, share_equal
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress


def traced(plan: Plan, provider: str, progress: Progress) -> Graph:
    """The graph that torch.export makes of the plan's model, in float32.

    Raises UnsupportedError if transformers or torch cannot build or trace the model, if an
    initializer has no tensor, and if the graph does not read a changed tensor.
    """
    place = f"{plan.base.spec}: model type {plan.base.architecture.model_type!r}"
    with traced_faults(place), traceable(plan.base.task == GENERATION):
        with progress.stage("tracing: model without weights"):
            model = weightless(live_config(plan), plan.base.task)
            sample = sample_of(model, plan.base.task)
        with progress.stage(f"tracing: {_layers(plan)} layers, which can take minutes"):
            graph = export(model, sample)
    with progress.stage("tracing: simplifying the graph"):
        name_interface(graph, OUTPUTS[plan.base.task])
        return finish(plan, graph, stored_parameters(model), provider)


def finish(plan: Plan, model: ir.Model, parameters: Set[str], provider: str) -> Graph:
    """Bind the initializers of a traced graph to the plan's tensors, and simplify the graph.

    Call it after `name_interface`.
    """
    weights = bind(plan, model, parameters)
    _simplify(model, weights, provider)
    _forget_traces(model)
    read = {n for e in weights.values() for n in e.names()}
    return Graph(model, weights, "traced", tuple(n for n in plan.base.tensors if n not in read))


def _layers(plan: Plan) -> int:
    stacks = plan.base.architecture.stacks
    return sum(stack.count for stack in stacks) if stacks else 0


def export(model: Any, sample: Sample) -> ir.Model:
    """One graph of `model` on `sample`, its initializers named as its parameters."""
    from transformers import exporters

    toolbox: Any = exporters  # its types stand in files that it does not ship

    settings = toolbox.OnnxConfig(dynamic_shapes=sample.shapes, optimize=False)
    with _quiet():
        graph, _ = toolbox.OnnxExporter().export_program(model, dict(sample.inputs), settings)
    assert isinstance(graph, ir.Model)
    return graph


def _simplify(model: ir.Model, weights: dict[str, Expression], provider: str) -> None:
    """Fold constants, move transposes of weights into their expressions, fuse for ONNX Runtime.

    Weights have no values here, so constant folding leaves them alone.
    """
    import onnxscript.optimizer
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with _quiet(), exactly_matched():
        onnxscript.optimizer.optimize(model)
        share_equal(model, weights)
        while fold(model, weights):
            pass
        fuse_for_onnxruntime(model, provider)
    for name in sorted(set(weights) - set(model.graph.initializers)):
        del weights[name]  # read by an output that was dropped
    for value in model.graph.initializers.values():
        if value.const_value is not None:  # fusions declare [] for a value of shape [1]
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.dtype = value.const_value.dtype


def _forget_traces(model: ir.Model) -> None:
    """Drop debugging data of the trace: stack traces with paths of this machine, and the symbolic
    shapes of intermediate values."""
    shaped = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    shaped |= {id(v) for v in model.graph.initializers.values()}
    model.metadata_props.clear()
    bodies: list[Any] = [*model.graphs(), *model.functions.values()]
    for graph in bodies:
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if id(value) not in shaped:
                    value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which print to standard output, where `--json` prints its document."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)


@contextlib.contextmanager
def traced_faults(place: str) -> Iterator[None]:
    """Turn what torch or transformers raise while tracing into an UnsupportedError.

    torch.export documents no exception class, so every class is caught; exceptions raised by code
    of this package are not converted.
    """
    from adaptrix_export.errors import AdaptrixError

    try:
        yield
    except (AdaptrixError, OSError, MemoryError):
        raise
    except Exception as error:  # the exporter raises whatever the model does
        if raised_by(error) is None:
            raise
        first = str(error).strip().split("\n")[0][:300]
        raise UnsupportedError(
            place, f"torch.export cannot trace it ({type(error).__name__}: {first})",
            "a traceable model", "use --target safetensors",
        ) from error  # fmt: skip
