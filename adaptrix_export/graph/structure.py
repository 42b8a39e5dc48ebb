"""Structural checks of the graph that a front end returns, made before its weights are written.

No values are read. Checked are the names, types and ranks of the interface, a `present` for each
`past`, initializers whose declared type or shape is not that of their tensor, and onnx.checker. The
checks also run where parity is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQ2SEQ, SEQUENCES, TOKENS
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.load.files.tensors import FLOATS
from adaptrix_export.plan import Plan

PAST, PRESENT = "past_key_values.", "present."
# Name -> rank of the inputs that are numbers of tokens, all of them int64.
_TOKENS = {
    "input_ids": 2, "attention_mask": 2, "position_ids": 2, "token_type_ids": 2,
    "encoder_attention_mask": 2,
}  # fmt: skip
_STATES = {"encoder_hidden_states": 3}
_CACHE_RANK = 4
_OF_TOKENS = (GENERATION, FEATURES, TOKENS, SEQUENCES, SEQ2SEQ)
_ANSWERS = ("logits", "last_hidden_state")
# Operators that ONNX Runtime registers in the domain of ONNX, whose checker does not know them:
# they are moved to the domain com.microsoft for the check.
_ELSEWHERE = frozenset({"SimplifiedLayerNormalization"})
_FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Fault = tuple[str, str, str]  # place, found, expected


def check_structure(
    model: ir.Model, weights: Mapping[str, Expression], plan: Plan, frontend: str
) -> None:
    """Raise UnsupportedError for the first fault in the graph of a front end.

    `weights` are the initializers without a value, by name, as in `graph.Graph`.
    """
    task = plan.base.task
    # Models with other inputs than tokens have other input and output names.
    tokens = task in _OF_TOKENS and plan.base.skeleton is None
    for checks in (
        *((_inputs(model, task), _outputs(model, task)) if tokens else ()),
        _initializers(model, weights, plan),
        _check_with_onnx(model),
    ):
        for place, found, expected in checks:
            raise UnsupportedError(
                f"{plan.base.spec}: graph of the {frontend} front end: {place}", found, expected,
                "this is a fault of the front end; try another --frontend",
            )  # fmt: skip


def _inputs(model: ir.Model, task: str) -> Iterator[Fault]:
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, value in inputs.items():
        cache = name.startswith(PAST) and task in (GENERATION, SEQ2SEQ)
        rank = _CACHE_RANK if cache else _TOKENS.get(name, _STATES.get(name))
        if rank is None:
            yield name, "an input beyond the interface", "input_ids, attention_mask and the cache"
            continue
        types = (ir.DataType.INT64,) if name in _TOKENS else _FLOATING
        yield from _typed(name, value, types, (rank,))
    for name in ("input_ids",):
        if name not in inputs:
            yield name, "no such input", "one"


def _outputs(model: ir.Model, task: str) -> Iterator[Fault]:
    outputs = {str(value.name): value for value in model.graph.outputs}
    answers = [name for name in outputs if name in _ANSWERS]
    if len(answers) != 1:
        yield "outputs", ", ".join(outputs) or "none", f"one of {' and '.join(_ANSWERS)}"
    if task == FEATURES and "logits" in outputs:
        yield "outputs", "logits", "last_hidden_state, the answer of this task"
    for name in answers:
        ranks = (2,) if task == SEQUENCES else (3,)
        yield from _typed(name, outputs[name], _FLOATING, ranks)
    past = {str(v.name).removeprefix(PAST) for v in model.graph.inputs
            if str(v.name).startswith(PAST)}  # fmt: skip
    present = {name.removeprefix(PRESENT) for name in outputs if name.startswith(PRESENT)}
    for name in sorted(past ^ present):
        if name in past:
            yield f"{PAST}{name}", f"no {PRESENT}{name}", "a present for each past"
        else:
            yield f"{PRESENT}{name}", f"no {PAST}{name}", "a past for each present"
    if task == GENERATION and not past:
        yield "inputs", "no cache", f"{PAST}*"
    for name, value in outputs.items():
        if name.startswith(PRESENT):
            yield from _typed(name, value, _FLOATING, (_CACHE_RANK,))
        elif name not in _ANSWERS:
            yield name, "an output beyond the interface", f"{' or '.join(_ANSWERS)}, {PRESENT}*"


def _typed(
    name: str, value: ir.Value, types: tuple[ir.DataType, ...], ranks: tuple[int, ...]
) -> Iterator[Fault]:
    if value.dtype not in types:
        yield name, f"type {value.dtype}", " or ".join(t.name for t in types)
    rank = None if value.shape is None else value.shape.rank()
    if rank not in ranks:
        yield name, f"rank {rank}", " or ".join(map(str, ranks))


def _initializers(
    model: ir.Model, weights: Mapping[str, Expression], plan: Plan
) -> Iterator[Fault]:
    changes = plan.changes()
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if name in weights:
            if value.dtype != ir.DataType.FLOAT:  # the weights are written as float32
                yield name, f"type {value.dtype}", "FLOAT, as its weights are written"
            if value.shape is None or not value.shape.is_static():
                yield name, f"shape {value.shape}", "sizes that are numbers"
            for source in weights[name].names():
                stored = plan.base.tensors.get(plan.base.tied.get(source, source))
                if source not in changes and stored is not None and stored.dtype not in FLOATS:
                    yield name, f"{source}, which is {stored.dtype}", "a tensor of floats"
        elif constant is None:
            yield name, "an initializer without a value", "a constant or a tensor of the base"
        else:
            if value.dtype is not None and value.dtype != constant.dtype:
                yield name, f"{constant.dtype} said to be {value.dtype}", "one type"
            if value.shape is not None and value.shape != constant.shape:
                yield name, f"{constant.shape} said to be {value.shape}", "one shape"


def _check_with_onnx(model: ir.Model) -> Iterator[Fault]:
    """onnx.checker with type and shape inference, on a copy whose weights are graph inputs."""
    graph = model.graph
    unbound = {name: v for name, v in graph.initializers.items() if v.const_value is None}
    for name in unbound:
        del graph.initializers[name]
    try:
        proto = ir.serde.serialize_model(model)
    finally:
        for name, value in unbound.items():
            graph.initializers[name] = value
    for name, value in unbound.items():
        known = ir.serde.serialize_value(value)
        known.name = name
        proto.graph.input.append(known)
    for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
        if node.op_type in _ELSEWHERE and node.domain == "":
            node.domain = "com.microsoft"
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = " ".join(str(error).split())[:300]
        yield "onnx.checker", first, "a valid model"
