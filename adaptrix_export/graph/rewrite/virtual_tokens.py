"""A learned prompt in the graph: virtual tokens in front of a request's own, or keys and values.

The interface stays what every client knows. Where the cache is empty the prompt comes first: its
rows are looked up behind those of the vocabulary, or its keys and values are the first entries of
the cache. The mask is longer by the prompt in every call, and no logits come out for its tokens:

    input_ids (batch, S), attention_mask (batch, T + S)  ->  logits (batch, S, vocabulary)

with T tokens fed before. The cache that comes out has the prompt's entries beside their T + S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import (
    Concat,
    Expression,
    Reshape,
    Slice,
    TensorRef,
    Transpose,
)
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.new_nodes import NewNodes
from adaptrix_export.plan import Plan, Prompt, Tensor

TENSOR = "prompt_embeddings"  # what expressions call the prompt's tensor
_ALL = np.iinfo(np.int64).max


def prompt_tensors(plan: Plan) -> Mapping[str, Tensor]:
    """What expressions name beside the tensors of the base."""
    return {TENSOR: prompt.tensor} if (prompt := plan.prompt) else {}


def wire_prompt(plan: Plan, graph: Graph) -> Graph:
    """The graph with the plan's prompt in it, if there is one.

    Raises UnsupportedError for a graph whose embedding or cache is not where this looks for it.
    """
    prompt = plan.prompt
    if prompt is None:
        return graph
    inputs = {str(value.name): value for value in graph.model.graph.inputs}
    if "past_key_values.0.key" not in inputs:
        raise UnsupportedError("traced graph", "no cache", "a decoder's", "serve it with PEFT")
    wiring = _Wiring(graph.model.graph, inputs, prompt)
    _lengthen_mask(wiring)
    if prompt.layers:
        weights = {**graph.weights, **_prefix(wiring)}
    else:
        weights = {**graph.weights, **_tokens(wiring, plan, graph)}
    first = next(iter(graph.model.graph))
    graph.model.graph.insert_before(first, wiring.nodes)
    kept = {n: e for n, e in weights.items() if n in graph.model.graph.initializers}
    return replace(graph, weights=kept)


@dataclass
class _Wiring(NewNodes):
    """New nodes, which come before all others, and the values that several of them need."""

    prefix = "prompt"
    inputs: Mapping[str, ir.Value]
    prompt: Prompt

    def __post_init__(self) -> None:
        past, ids = self.inputs["past_key_values.0.key"], self.inputs["input_ids"]
        self.readers = {name: list(value.uses()) for name, value in self.inputs.items()}
        none, count = self.index("none", 0), self.index("count", self.prompt.tokens)
        cached = self.add("Shape", past, start=2, end=3)
        self.now = self.add("Where", self.add("Equal", cached, none), count, none)
        self.batch = self.add("Shape", ids, start=0, end=1)

    def weight(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """An initializer whose values follow from an expression."""
        kind = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        self.graph.initializers[name] = value
        return value

    def index(self, name: str, number: int) -> ir.Value:
        return self.constant(name, np.array([number], np.int64))

    def rows(self, value: ir.Value, inner: tuple[int, ...], axis: int) -> ir.Value:
        """`value` (1, ...) for each row of the batch, and nothing of it behind a cache."""
        zero = self.index("none", 0)
        kept = self.add("Slice", value, zero, self.now, self.index(f"axis{axis}", axis))
        sizes = [1 if n < 0 else n for n in inner]
        ones = self.constant(f"ones{axis}.{len(self.nodes)}", np.array(sizes, np.int64))
        return self.add("Expand", kept, self.add("Concat", self.batch, ones, axis=0))

    def instead(self, name: str, value: ir.Value) -> None:
        """Let what read an input read `value`."""
        for use in self.readers[name]:
            use.node.replace_input_with(use.idx, value)


def _lengthen_mask(wiring: _Wiring) -> None:
    mask, count = wiring.inputs["attention_mask"], wiring.prompt.tokens
    ones = wiring.constant("seen", np.ones((1, count), np.int64))
    size = wiring.constant("mask_size", np.array([count], np.int64))
    spread = wiring.add("Expand", ones, wiring.add("Concat", wiring.batch, size, axis=0))
    wiring.instead("attention_mask", wiring.add("Concat", spread, mask, axis=1))
    if "position_ids" not in wiring.inputs:
        return
    positions = wiring.add("Add", wiring.inputs["position_ids"], wiring.index("count", count))
    if not wiring.prompt.layers:
        own = wiring.constant("places", np.arange(count, dtype=np.int64)[None])
        positions = wiring.add("Concat", wiring.rows(own, (-1,), 1), positions, axis=1)
    wiring.instead("position_ids", positions)


def _tokens(wiring: _Wiring, plan: Plan, graph: Graph) -> dict[str, Expression]:
    """Virtual tokens have the ids behind the vocabulary, in a table with their rows at its end."""
    name = f"{plan.base.architecture.family.embedding}.weight"
    home = TensorRef(plan.base.tied.get(name, name))
    tables = [n for n, e in graph.weights.items() if e == home]
    lookups = [
        use for n in tables for use in wiring.graph.initializers[n].uses()
        if use.node.op_type == "Gather" and use.idx == 0
    ]  # fmt: skip
    if not lookups:
        raise UnsupportedError(
            f"traced graph: {name}", "no lookup of tokens", "one", "serve it with PEFT"
        )
    shape = wiring.graph.initializers[tables[0]].shape
    rows, width = shape.numpy() if shape is not None else (0, 0)
    count = wiring.prompt.tokens
    table = wiring.weight(f"{name}.with_prompt", (rows + count, width))
    for use in lookups:
        use.node.replace_input_with(0, table)
    for own in tables:
        if not wiring.graph.initializers[own].uses():
            del wiring.graph.initializers[own]
    ids = wiring.constant("ids", np.arange(rows, rows + count, dtype=np.int64)[None])
    fed = wiring.add("Concat", wiring.rows(ids, (-1,), 1), wiring.inputs["input_ids"], axis=1)
    wiring.instead("input_ids", fed)
    _cut_logits(wiring)
    return {str(table.name): Concat(0, (home, TensorRef(TENSOR)))}


def _cut_logits(wiring: _Wiring) -> None:
    """Only the logits of the tokens that were fed come out."""
    place, logits = next((i, v) for i, v in enumerate(wiring.graph.outputs) if v.name == "logits")
    last, one = wiring.constant("end", np.array([_ALL], np.int64)), wiring.index("axis1", 1)
    node = ir.node("Slice", [logits, wiring.now, last, one], name="prompt.logits")
    cut = node.outputs[0]
    cut.type, cut.shape = logits.type, logits.shape
    logits.name, cut.name = "prompt.all_logits", "logits"
    logits.shape = None
    wiring.graph.append(node)
    wiring.graph.outputs[place] = cut


def _prefix(wiring: _Wiring) -> dict[str, Expression]:
    """Each layer's keys and values, (1, heads, tokens, size), before those of the cache."""
    prompt = wiring.prompt
    tokens, width = prompt.tensor.shape
    size = width // (2 * prompt.layers * prompt.heads)
    whole = Reshape((tokens, 2 * prompt.layers, prompt.heads, size), TensorRef(TENSOR))
    made: dict[str, Expression] = {}
    for number in range(2 * prompt.layers):
        past = f"past_key_values.{number // 2}.{('key', 'value')[number % 2]}"
        if past not in wiring.inputs:
            raise UnsupportedError(
                f"traced graph: {past}", "no such input", "a cache of every layer",
                "serve it with PEFT",
            )  # fmt: skip
        name = f"prompt.{number // 2}.{('key', 'value')[number % 2]}"
        value = wiring.weight(name, (1, prompt.heads, tokens, size))
        made[name] = Transpose((1, 2, 0, 3), Slice(1, number, number + 1, whole))
        first = wiring.rows(value, (prompt.heads, -1, size), 2)
        wiring.instead(past, wiring.add("Concat", first, wiring.inputs[past], axis=2))
    return made
