"""The functions of domain `ai.adaptrix`: what a gate computes, as ONNX local functions.

A site is one call node in a viewer; ONNX Runtime puts the function's nodes in its place when it
loads the graph. For one token, with the base's output y0, the adapter's contribution d and the
token's mask m (1 for a token, 0 for padding):

    Clamp   g = m min(1, tau |y0| / |d|)    y = y0 + g d
    Mask    g = m                           y = y0 + g d

Clamp promises |y - y0| <= tau |y0| (1 + 1e-5) in float32, whatever the numbers. So the norms are
taken in float64, where no square of a float32 overflows or vanishes, and the limit is a hair below
tau |y0|: by ROUNDING |y0|, which is more than the last addition can be off by, and by TINY, which
is more than the smallest float32 numbers can be off by and keeps 0/0 out. A padded token has a
limit below zero, so its gate is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

DOMAIN = "ai.adaptrix"
VERSION = 1
ROUNDING = 2.0**-22
TINY = 1.2345e-40


class _Body:
    """Nodes of a function, in order, named for what they give."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, kind: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        made = ir.node(kind, list(inputs), attributes=attributes or None, name=name)  # type: ignore[arg-type]
        made.outputs[0].name = name
        self.nodes.append(made)
        return made.outputs[0]

    def double(self, number: float, name: str) -> ir.Value:
        return self.add("Constant", name, value=ir.tensor(number, dtype=ir.DataType.DOUBLE))


def _given(attribute: str) -> ir.Attr:
    """An attribute of a node that the call of its function gives."""
    return ir.RefAttr("value_float", attribute, ir.AttributeType.FLOAT)


def _clamp() -> ir.Function:
    y0, d, mask = (ir.Value(name=n) for n in ("y0", "d", "mask"))
    body = _Body()
    tau = body.add("Constant", "tau", value_float=_given("tau"))
    wide = {"to": ir.DataType.DOUBLE}
    exact = body.add("Cast", "tau_double", tau, **wide)
    share = body.add("Sub", "tau_below", exact, body.double(ROUNDING, "rounding"))
    allowed = body.add("Mul", "allowed", mask, share)  # the same for all sites of one tau
    norms = {
        name: body.add(
            "ReduceL2", f"{name}_norm", body.add("Cast", f"{name}_double", value, **wide),
            body.add("Constant", f"{name}_axis", value_ints=[-1]), keepdims=1,
        )
        for name, value in (("y0", y0), ("d", d))
    }  # fmt: skip
    limit = body.add("Mul", "limit", norms["y0"], allowed)
    below = body.add("Sub", "limit_below", limit, body.double(TINY, "tiny"))
    ratio = body.add("Div", "ratio", below, norms["d"])
    zero, one = body.double(0.0, "zero"), body.double(1.0, "one")
    gate = body.add("CastLike", "gate", body.add("Clip", "gate_double", ratio, zero, one), y0)
    return _function("Clamp", body, (y0, d, mask), gate, ["tau"])


def _mask() -> ir.Function:
    y0, d, mask = (ir.Value(name=n) for n in ("y0", "d", "mask"))
    body = _Body()
    return _function("Mask", body, (y0, d, mask), body.add("CastLike", "gate", mask, y0), [])


def _function(
    name: str,
    body: _Body,
    inputs: tuple[ir.Value, ir.Value, ir.Value],
    gate: ir.Value,
    attributes: list[str],
) -> ir.Function:
    y0, d, _ = inputs
    y = body.add("Add", "y", y0, body.add("Mul", "kept", d, gate))
    graph = ir.Graph(inputs, [y, gate], nodes=body.nodes, opset_imports={"": 18})
    own = [ir.Attr(a, ir.AttributeType.FLOAT, None) for a in attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=own)


FUNCTIONS: dict[str, tuple[str, Callable[[], ir.Function]]] = {
    "clamp": ("Clamp", _clamp),
    "mask": ("Mask", _mask),
}


def define(model: ir.Model, modes: set[str]) -> None:
    """Put the functions of these modes into the model."""
    model.opset_imports.setdefault(DOMAIN, VERSION)
    for mode in sorted(modes):
        function = FUNCTIONS[mode][1]()
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function


def call(mode: str, inputs: list[ir.Value], name: str, tau: float | None) -> ir.Node:
    """The node of one site: (y0, d, mask) -> (y, gate)."""
    attributes = None if tau is None else {"tau": float(tau)}
    kind = FUNCTIONS[mode][0]
    node = ir.node(kind, inputs, domain=DOMAIN, attributes=attributes, num_outputs=2, name=name)
    node.outputs[0].name, node.outputs[1].name = f"{name}.gated", f"{name}.gate"
    return node
