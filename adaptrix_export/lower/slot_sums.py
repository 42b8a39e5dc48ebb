"""Adds what slots contribute to the values of a graph, in as few and as cheap nodes as it takes.

    x2 -> MatMul A -> t  \\
    x2 -> MatMul W -> y0 -> Gemm(t, B, y0) -> y

A Gemm adds while it multiplies: a node less than MatMul and Add, and a pass less over the outputs.
It takes matrices, so that batch and tokens are one axis there (x2), and two again after it. What
it adds of an empty slot is nothing at all, so y is y0 bit for bit.

    x -> MatMul A -> [mask] -> MatMul B -> d,  y0 + d -> y

is how it is done where the graph has no plain product to add to, or where rows are masked; and
where modules are packed into one value, d being what their slots contribute, side by side, with
zeros for modules without a slot.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from adaptrix_export.lower.slots import Branch, node
from adaptrix_export.lower.taps import integers, joined, replaced


def join(model: ir.Model, branches: Iterable[Branch]) -> int:
    """Add what each branch contributes to its place; returns how many there are."""
    by_value: dict[int, list[Branch]] = {}
    for branch in branches:
        by_value.setdefault(id(branch.place.value), []).append(branch)
    products = _Products(model)
    for parts in by_value.values():
        (first, *more) = parts
        alone = not more and not first.masked and first.place.is_whole
        if not (alone and (_add_to_gemm(model, first) or products.add(first))):
            _add(model, parts)
    model.graph.sort()
    return sum(map(len, by_value.values()))


def _add(model: ir.Model, branches: list[Branch]) -> None:
    """MatMul and Add: what the branches contribute to one value joins it, for all who read it."""
    value, name = branches[0].place.value, branches[0].place.slot.name
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
    contribution, together = joined(parts, f"{name}.lora_parts")
    total = node("Add", [value, contribution], f"{name}.lora_sum")
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, [*nodes, *together, total])
    replaced(model, value, total.outputs[0], [total])


def _add_to_gemm(model: ir.Model, branch: Branch) -> bool:
    """Where a Gemm made the value, all is matrices already."""
    value = branch.place.value
    producer = value.producer()
    if producer is None or producer.op_type != "Gemm" or producer.domain:
        return False
    total = _gemm(branch, value)
    model.graph.insert_after(producer, [*branch.nodes, total])
    replaced(model, value, total.outputs[0], [total])
    return True


def _gemm(branch: Branch, value: ir.Value) -> ir.Node:
    inputs = [branch.nodes[-1].outputs[0], branch.b, value]
    return node("Gemm", inputs, f"{branch.place.slot.name}.lora_sum")


class _Products:
    """Products of a whole (batch, tokens, inputs) with a weight, made products of matrices."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._matrices: dict[int, ir.Value] = {}
        self._shape: ir.Value | None = None
        self._ids = next((v for v in model.graph.inputs if v.name == "input_ids"), None)

    def add(self, branch: Branch) -> bool:
        """False, and nothing done, where the value is not such a product, with or without bias."""
        down = branch.nodes[0]
        x = down.inputs[0]
        assert x is not None  # what `branch.place.x` is by now: an earlier slot may have joined it
        product = _product(branch.place.value, x)
        if product is None or not self._is_whole(x):
            return False
        model, name, value = self._model, branch.place.slot.name, product.outputs[0]
        matrix = self._matrix(x, branch.place.slot.inputs)
        for reader in (product, down):
            reader.replace_input_with(0, matrix)
        total = _gemm(branch, value)
        whole = node("Reshape", [total.outputs[0], self._whole()], f"{name}.lora_whole")
        model.graph.insert_after(product, [*branch.nodes, total, whole])
        replaced(model, value, whole.outputs[0], [total])
        value.shape = None  # a matrix now
        return True

    def _is_whole(self, x: ir.Value) -> bool:
        """Whether x has the batch and the tokens of this call, and one axis more."""
        if x.shape is None or self._ids is None or self._ids.shape is None:
            return False
        return list(x.shape)[:-1] == list(self._ids.shape)

    def _matrix(self, x: ir.Value, inputs: int) -> ir.Value:
        """(batch * tokens, inputs), once for all slots that read x."""
        if id(x) not in self._matrices:
            sizes = integers(self._model, f"{x.name}.matrix_shape", [-1, inputs])
            made = node("Reshape", [x, sizes], f"{x.name}.matrix")
            producer = x.producer()
            if producer is None:
                self._model.graph.insert_before(self._model.graph[0], [made])
            else:
                self._model.graph.insert_after(producer, [made])
            self._matrices[id(x)] = made.outputs[0]
        return self._matrices[id(x)]

    def _whole(self) -> ir.Value:
        """[batch, tokens, -1]"""
        if self._shape is None:
            assert self._ids is not None  # `_is_whole` saw to it
            sizes = node("Shape", [self._ids], "slots.batch_and_tokens")
            rest = integers(self._model, "slots.rest", [-1])
            made = ir.node("Concat", [sizes.outputs[0], rest], {"axis": 0}, name="slots.whole")
            made.outputs[0].name = made.name
            self._model.graph.insert_before(self._model.graph[0], [sizes, made])
            self._shape = made.outputs[0]
        return self._shape


def _product(value: ir.Value, x: ir.Value) -> ir.Node | None:
    """The MatMul of x that makes the value, by itself or with a bias that is added to it."""
    made = value.producer()
    if made is not None and made.op_type == "Add" and not made.domain:
        found = [p for v in made.inputs if v is not None and (p := v.producer()) is not None]
        made = next((p for p in found if p.op_type == "MatMul"), None)
        if made is None or len(list(made.outputs[0].uses())) != 1:
            return None
    if made is None or made.op_type != "MatMul" or made.domain or made.inputs[0] is not x:
        return None
    return made
