"""The output `sentence_embedding` of a features graph: one vector a row, beside hidden states.

Each kind is a row of `POOLINGS`, as sentence-transformers' Pooling takes it: `mean` over the tokens
that the mask keeps (a row of pads alone gives zeros); `mean_sqrt_len` divides their sum by the root
of their number; `weightedmean` weighs a token by its place, from 1 on; `max` takes the largest of
each number; `lasttoken` is the last token that the mask keeps, `cls` the first position. Several,
joined by `+`, stand one after the other in the vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.rewrite.new_nodes import NewNodes

OUTPUT = "sentence_embedding"
SMALLEST = 1e-9  # what sentence-transformers divides by where there is no token
LOWEST = -1e9  # what it takes for a pad in `max`


def wire_pooling(model: ir.Model, kind: str) -> int:
    """Append the output and return the number of nodes that make it.

    Raises UnsupportedError for a graph without hidden states.
    """
    graph = model.graph
    hidden = next((v for v in graph.outputs if v.name == "last_hidden_state"), None)
    if hidden is None:
        raise UnsupportedError(
            f"pooling {kind}", "a graph without last_hidden_state", "a feature-extraction graph",
            "leave pooling out",
        )  # fmt: skip
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    wiring = _Wiring(graph, hidden, mask)
    parts = [POOLINGS[part](wiring) for part in kind.split("+")]
    pooled = parts[0] if len(parts) == 1 else wiring.add("Concat", *parts, axis=1)
    graph.extend(wiring.nodes)
    pooled.name = OUTPUT
    pooled.type = ir.TensorType(ir.DataType.FLOAT)
    sizes = hidden.shape if hidden.shape is not None else ("batch", None, None)
    width = sizes[2] if len(parts) == 1 or not isinstance(sizes[2], int) else len(parts) * sizes[2]
    pooled.shape = ir.Shape([sizes[0], width])
    graph.outputs.append(pooled)
    return len(wiring.nodes)


@dataclass
class _Wiring(NewNodes):
    """Collects new nodes and their constants; values that several poolings need are shared."""

    prefix = "pooling"
    hidden: ir.Value
    mask: ir.Value
    made: dict[str, ir.Value] = field(default_factory=dict)

    def index(self, name: str, value: int) -> ir.Value:
        return self.constant(name, np.array([value], np.int64))

    @property
    def token_mask(self) -> ir.Value:
        """The mask as numbers, (rows, tokens, 1)."""
        if "token_mask" not in self.made:
            numbers = self.add("Cast", self.mask, to=ir.DataType.FLOAT)
            self.made["token_mask"] = self.add("Unsqueeze", numbers, self.index("last_axis", -1))
        return self.made["token_mask"]

    @property
    def masked(self) -> ir.Value:
        """The hidden states, zero at pads."""
        if "masked" not in self.made:
            self.made["masked"] = self.add("Mul", self.hidden, self.token_mask)
        return self.made["masked"]

    @property
    def total(self) -> ir.Value:
        if "total" not in self.made:
            self.made["total"] = self.over_tokens("ReduceSum", self.masked)
        return self.made["total"]

    @property
    def count(self) -> ir.Value:
        """Number of tokens of each row, at least SMALLEST."""
        if "count" not in self.made:
            self.made["count"] = self.some(self.over_tokens("ReduceSum", self.token_mask))
        return self.made["count"]

    def over_tokens(self, kind: str, value: ir.Value) -> ir.Value:
        return self.add(kind, value, self.index("token_axis", 1), keepdims=0)

    def some(self, value: ir.Value) -> ir.Value:
        return self.add("Max", value, self.constant("smallest", np.array(SMALLEST, np.float32)))

    def places(self, dtype: ir.DataType) -> ir.Value:
        """1, 2, ... at tokens, by position, and 0 at pads: (rows, tokens)."""
        axis = self.constant("axis", np.array(1, np.int64))
        one = ir.tensor(np.array([1], np.int64))
        ones = self.add("ConstantOfShape", self.add("Shape", self.mask), value=one)
        counted = self.add("Mul", self.add("CumSum", ones, axis), self.mask)
        return self.add("Cast", counted, to=dtype)


def _first(wiring: _Wiring) -> ir.Value:
    start = wiring.constant("first", np.array(0, np.int64))
    return wiring.add("Gather", wiring.hidden, start, axis=1)


def _mean(wiring: _Wiring) -> ir.Value:
    return wiring.add("Div", wiring.total, wiring.count)


def _mean_sqrt_len(wiring: _Wiring) -> ir.Value:
    return wiring.add("Div", wiring.total, wiring.add("Sqrt", wiring.count))


def _weighted_mean(wiring: _Wiring) -> ir.Value:
    places = wiring.places(ir.DataType.FLOAT)
    weights = wiring.add("Unsqueeze", places, wiring.index("last_axis", -1))
    total = wiring.over_tokens("ReduceSum", wiring.add("Mul", wiring.hidden, weights))
    return wiring.add("Div", total, wiring.some(wiring.over_tokens("ReduceSum", weights)))


def _largest(wiring: _Wiring) -> ir.Value:
    zero = wiring.constant("zero", np.array(0, np.float32))
    pad = wiring.add("Equal", wiring.token_mask, zero)
    lowest = wiring.constant("lowest", np.array(LOWEST, np.float32))
    return wiring.over_tokens("ReduceMax", wiring.add("Where", pad, lowest, wiring.hidden))


def _last(wiring: _Wiring) -> ir.Value:
    """The last token that the mask keeps; a row of pads only gives zeros."""
    places = wiring.places(ir.DataType.INT64)
    index = wiring.add("ArgMax", places, axis=1, keepdims=1)
    return wiring.add("GatherND", wiring.masked, index, batch_dims=1)


POOLINGS: dict[str, Callable[[_Wiring], ir.Value]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
