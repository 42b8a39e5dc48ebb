"""The functions of domain `ai.adaptrix`: what a gate computes, as ONNX local functions.

A site is one call node in a viewer; ONNX Runtime puts the function's nodes in its place when it
loads the graph. For one token, with the base's output y0, the adapter's contribution d and the
token's mask m (1 for a token, 0 for padding):

    Clamp   g = m min(1, tau |y0| / |d|)    y = y0 + g d
    Mask    g = m                           y = y0 + g d

The time of a decode step depends on the number of nodes, so Clamp has as few as possible, float32:

    g = HardSigmoid(|y0| / max(|d|, floor); tau, offset)

`floor`, one number a token, is FLOOR, or infinite for padding, whose gate is then 0. Clamp
guarantees
|y - y0| <= tau |y0| (1 + 1e-5) for outputs up to 2^63, above which the norms of the model itself
overflow. The attribute `tau` is therefore the plan's tau minus the rounding error of the sums of
squares and of the last addition (`plan.clamp_slope`), and `offset` closes the gate for |y0| <
2^-55, whose squares underflow.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from adaptrix_export.plan import clamp_slope

DOMAIN = "ai.adaptrix"
VERSION = 1
FLOOR = 2.0**-26
OFFSET = 2.0**-29


class _Body:
    """Nodes of a function, in order, named for what they give."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, kind: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        made = ir.node(kind, list(inputs), attributes=attributes or None, name=name)  # type: ignore[arg-type]
        made.outputs[0].name = name
        self.nodes.append(made)
        return made.outputs[0]


def _ref_attribute(name: str, attribute: str) -> ir.Attr:
    """Attribute `name` of a node, set by the attribute `attribute` of the function's call."""
    return ir.RefAttr(name, attribute, ir.AttributeType.FLOAT)


def _clamp() -> ir.Function:
    y0, d, floor = (ir.Value(name=n) for n in ("y0", "d", "floor"))
    body = _Body()
    axis = body.add("Constant", "axis", value_ints=[-1])
    norms = [body.add("ReduceL2", f"{v.name}_norm", v, axis, keepdims=1) for v in (y0, d)]
    ratio = body.add("Div", "ratio", norms[0], body.add("Max", "d_size", norms[1], floor))
    line = {"alpha": _ref_attribute("alpha", "tau"), "beta": _ref_attribute("beta", "offset")}
    gate = body.add("HardSigmoid", "gate", ratio, **line)
    return _function("Clamp", body, (y0, d, floor), gate, ["tau", "offset"])


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


def call(mode: str, inputs: list[ir.Value], name: str, tau: float | None, width: int) -> ir.Node:
    """The node of one site of `width` outputs: (y0, d, mask or floor) -> (y, gate)."""
    attributes = None
    if tau is not None:
        attributes = {"tau": clamp_slope(tau, width), "offset": -OFFSET * tau}
    kind = FUNCTIONS[mode][0]
    node = ir.node(kind, inputs, domain=DOMAIN, attributes=attributes, num_outputs=2, name=name)
    node.outputs[0].name, node.outputs[1].name = f"{name}.gated", f"{name}.gate"
    return node
