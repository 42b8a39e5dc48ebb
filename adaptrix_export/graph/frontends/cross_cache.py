"""The decoder's cross-attention cache, wired from two traces.

One trace is the decoder, which reads the keys and values of the encoder's states from its cache;
the other computes them from the states. They are merged into one graph. In the first call the cache
is empty and the projections get all states; in later calls they get zero rows:

    keys = Concat(past, projected(states[:, :n])),  n = all where the past is empty, else 0

So one graph serves every step, without a branch, and a step costs no projection of the states.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

STATES = "encoder_hidden_states"
PAST_ENTRY = re.compile(r"^past_key_values\.(\d+)\.encoder\.(key|value)$")
_START = "cross."


def wire_cross_cache(decoder: ir.Model, projections: ir.Model) -> int:
    """Move the nodes of `projections` into `decoder`; returns the number of cache entries wired.

    `decoder` has inputs `past_key_values.{i}.encoder.key/value` and gets outputs of the same
    names with `present`; `projections` computes `present.{i}.encoder.key/value` from the states.
    """
    graph = decoder.graph
    states = next(v for v in graph.inputs if v.name == STATES)
    pasts = [v for v in graph.inputs if PAST_ENTRY.match(str(v.name))]
    projected = {str(v.name): v for v in projections.graph.outputs}
    readers = {past.name: list(past.uses()) for past in pasts}
    state_nodes = _states_without_past(graph, states, pasts[0])
    nodes = list(projections.graph)
    _merge_graph(graph, projections.graph, state_nodes[-1].outputs[0])
    joints = []
    for past in pasts:
        name = str(past.name).replace("past_key_values", "present", 1)
        joint = ir.node(
            "Concat", [past, projected[name]], attributes={"axis": 2}, name=f"{name}.joint"
        )
        answer = joint.outputs[0]
        for use in readers[past.name]:
            use.node.replace_input_with(use.idx, answer)
        answer.name = name
        answer.type = ir.TensorType(ir.DataType.FLOAT)
        assert past.shape is not None
        sizes: list[int | ir.SymbolicDim | str | None] = list(past.shape)
        sizes[2] = "encoder_sequence_length"
        answer.shape = ir.Shape(sizes)
        graph.outputs.append(answer)
        joints.append(joint)
    first = next(iter(graph))
    graph.insert_before(first, [*state_nodes, *nodes, *joints])
    return len(joints)


def _states_without_past(graph: ir.Graph, states: ir.Value, past: ir.Value) -> list[ir.Node]:
    """Nodes, the last of which outputs the states if `past` is empty, else zero rows of them."""
    everything = _constant(graph, "all", np.array([np.iinfo(np.int64).max], np.int64))
    none = _constant(graph, "none", np.array([0], np.int64))
    rows = _constant(graph, "rows", np.array([1], np.int64))
    length = ir.node("Shape", [past], attributes={"start": 2, "end": 3})
    empty = ir.node("Equal", [length.outputs[0], none])
    stop = ir.node("Where", [empty.outputs[0], everything, none])
    selected = ir.node("Slice", [states, none, stop.outputs[0], rows])
    nodes = [length, empty, stop, selected]
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{_START}{number}.{node.op_type.lower()}"
    return nodes


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    constant = ir.tensor(value, name=_START + name)
    initializer = ir.Value(
        name=constant.name, shape=ir.Shape(value.shape), type=ir.TensorType(constant.dtype),
        const_value=constant,
    )  # fmt: skip
    graph.initializers[str(constant.name)] = initializer
    return initializer


def _merge_graph(graph: ir.Graph, other: ir.Graph, states: ir.Value) -> None:
    """Move the initializers of `other` into `graph`, and give its nodes and values new names.

    Parameters have the same name in both graphs and are shared; constants of a trace are numbered
    from the start in each, so those of `other` are renamed.
    """
    source = next(v for v in other.inputs if v.name == STATES)
    source.replace_all_uses_with(states)
    nodes = list(other)
    other.outputs.clear()
    other.remove(nodes)
    for name, value in list(other.initializers.items()):
        del other.initializers[name]
        known = graph.initializers.get(name)
        if known is not None and value.const_value is None and known.const_value is None:
            value.replace_all_uses_with(known)
            continue
        if known is not None and _same_parameter(known, value):
            value.replace_all_uses_with(known)
            continue
        value.name = name if known is None else _START + name
        graph.initializers[value.name] = value
    for node in nodes:
        node.name = _START + str(node.name)
        for output in node.outputs:
            output.name = _START + str(output.name)


def _same_parameter(one: ir.Value, other: ir.Value) -> bool:
    """Whether both are the same parameter, which has a shape in a trace and no readable values."""
    return "." in str(one.name) and one.shape == other.shape and one.dtype == other.dtype
