"""Adds the contributions of slots to the values of a graph, with as few and cheap nodes as
possible.

    x2 -> MatMul A -> t  \\
    x2 -> MatMul W -> y0 -> Gemm(t, B, y0) -> y

A Gemm multiplies and adds: one node less than MatMul and Add, and one pass less over the outputs.
It takes matrices, so batch and tokens are one axis there (x2; see `matrices.py`). An empty slot has
inner dimension 0, so y is y0 bit for bit.

    x -> MatMul A -> [mask] -> MatMul B -> d,  y0 + d -> y

is used where the value is not the output of a plain MatMul, or where rows are masked.

Where modules are packed into one value, d is the concatenation of their slots' contributions, with
zeros for modules without a slot, and the module's own product becomes the Gemm that adds it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from adaptrix_export.graph.rewrite.matrices import Matrices
from adaptrix_export.graph.rewrite.slots import Branch, node
from adaptrix_export.graph.rewrite.taps import integers, joined, replace_uses


def join(model: ir.Model, branches: Iterable[Branch], settle: bool = True) -> int:
    """Add the contribution of each branch to its place; returns the number of branches.

    Without `settle` no further values become matrices, so that gates can be wired to them.
    """
    by_value: dict[int, list[Branch]] = {}
    for branch in branches:
        by_value.setdefault(id(branch.place.value), []).append(branch)
    products = _Products(model)
    for parts in by_value.values():
        (first, *more) = parts
        alone = not more and first.place.is_whole
        if first.masked or not (
            (alone and (_add_to_gemm(model, first) or products.add(first)))
            or (not alone and products.add_packed(parts))
        ):
            _add(model, parts)
    if settle:
        products.matrices.settle()
        products.matrices.declare()
    model.graph.sort()
    return sum(map(len, by_value.values()))


def _add(model: ir.Model, branches: list[Branch]) -> None:
    """Add the branches' contributions to one value with MatMul and Add; readers use the sum."""
    value = branches[0].place.value
    contribution, nodes = _side_by_side(model, branches)
    total = node("Add", [value, contribution], f"{branches[0].place.slot.name}.lora_sum")
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, [*nodes, total])
    replace_uses(model, value, total.outputs[0], [total])


def _side_by_side(model: ir.Model, branches: list[Branch]) -> tuple[ir.Value, list[ir.Node]]:
    """The concatenated contributions to one value, padded to its width, and their nodes."""
    nodes = [n for branch in branches for n in branch.nodes]
    parts: list[ir.Value] = []
    branches.sort(key=lambda branch: branch.place.columns)
    ends = [branch.place.columns[0] for branch in branches[1:]] + [branches[0].place.width]
    done = 0
    for branch, end in zip(branches, ends, strict=True):
        up = branch.up()
        nodes.append(up)
        zeros = (branch.place.columns[0] - done, end - branch.place.columns[1])
        if any(zeros):
            widths = integers(model, f"{branch.place.slot.name}.lora_zeros", list(zeros))
            axis = integers(model, "slots.last_axis", [-1])
            up = ir.node("Pad", [up.outputs[0], widths, None, axis])
            up.name = up.outputs[0].name = f"{branch.place.slot.name}.lora_wide"
            nodes.append(up)
        parts.append(up.outputs[0])
        done = end
    contribution, together = joined(parts, f"{branches[0].place.slot.name}.lora_parts")
    return contribution, [*nodes, *together]


def _add_to_gemm(model: ir.Model, branch: Branch) -> bool:
    """Add the contribution with a Gemm, if the value is a Gemm's output: a matrix already."""
    value = branch.place.value
    producer = value.producer()
    if producer is None or producer.op_type != "Gemm" or producer.domain:
        return False
    total = _gemm(branch, value)
    model.graph.insert_after(producer, [*branch.nodes, total])
    replace_uses(model, value, total.outputs[0], [total])
    return True


def _gemm(branch: Branch, value: ir.Value) -> ir.Node:
    inputs = [branch.nodes[-1].outputs[0], branch.b, value]
    return node("Gemm", inputs, f"{branch.place.slot.name}.lora_sum")


class _Products:
    """Turns products of (batch, tokens, inputs) with a weight into products of matrices.

    Both `add` methods return False and change nothing if the value is not such a product, with or
    without a bias.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.matrices = Matrices(model)

    def add(self, branch: Branch) -> bool:
        """For a slot on all columns: a Gemm with B that adds the module's own product."""
        match = self._match([branch])
        if match is None:
            return False
        product, matrix = match
        for reader in (product, branch.nodes[0]):
            reader.replace_input_with(0, matrix)
        total = _gemm(branch, product.outputs[0])
        self._join(product, [*branch.nodes, total], branch.place.slot.name)
        return True

    def add_packed(self, branches: list[Branch]) -> bool:
        """For packed modules: the module's own product becomes a Gemm that adds all slots' sum."""
        match = self._match(branches)
        weight = match[0].inputs[1] if match is not None else None
        if match is None or weight is None or weight.shape is None or len(weight.shape) != 2:
            return False
        product, matrix = match
        for branch in branches:
            branch.nodes[0].replace_input_with(0, matrix)
        contribution, nodes = _side_by_side(self._model, branches)
        name = branches[0].place.slot.name
        total = node("Gemm", [matrix, weight, contribution], f"{name}.lora_sum")
        self._join(product, [*nodes, total], name)
        self._model.graph.remove(product, safe=True)
        return True

    def _match(self, branches: list[Branch]) -> tuple[ir.Node, ir.Value] | None:
        """The product, and the matrix that it and the branches shall read; None if not such one."""
        place = branches[0].place
        x = branches[0].nodes[0].inputs[0]
        assert x is not None  # what `place.x` is by now: an earlier slot may have joined it
        product = _product(place.value, x)
        if product is None or not self.matrices.is_whole(x):
            return None
        return product, self.matrices.of(x, place.slot.inputs)

    def _join(self, product: ir.Node, nodes: list[ir.Node], name: str) -> None:
        """Insert the nodes after the product; readers use the output of the last one instead."""
        (*_, total), value = nodes, product.outputs[0]
        weight = product.inputs[1]
        assert weight is not None  # of a MatMul
        whole = self.matrices.whole(total.outputs[0], f"{name}.lora_whole", weight)
        self._model.graph.insert_after(product, [*nodes, whole])
        replace_uses(self._model, value, whole.outputs[0], [total])
        value.shape = None  # a matrix now


def _product(value: ir.Value, x: ir.Value) -> ir.Node | None:
    """The MatMul of x that computes the value, or the value before a bias is added."""
    node = value.producer()
    if node is not None and node.op_type == "Add" and not node.domain:
        producers = [p for v in node.inputs if v is not None and (p := v.producer()) is not None]
        node = next((p for p in producers if p.op_type == "MatMul"), None)
        if node is None or len(list(node.outputs[0].uses())) != 1:
            return None
    if node is None or node.op_type != "MatMul" or node.domain or node.inputs[0] is not x:
        return None
    return node
