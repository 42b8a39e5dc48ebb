"""Values of (batch, tokens, width) as matrices of (batch * tokens, width), for the Gemms of slots.

A Gemm adds a slot's contribution while it multiplies, but takes matrices only. The nodes between
two such products act on each token independently (norms, activations, residual sums), and give the
same result on a matrix, bit for bit. So values stay matrices from product to product, and are
reshaped back only for nodes that need batch and tokens apart, such as attention. "Whole" below
means a value of (batch, tokens, width).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from adaptrix_export.graph.rewrite.taps import integers, replace_uses

_EACH = {  # (domain, operator): of one number, or of two of the same token
    *(("", name) for name in (
        "Abs", "Add", "Cast", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "LeakyRelu", "Mish", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Sqrt",
        "Sub", "Tanh",
    )),
    *(("com.microsoft", name) for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")),
}  # fmt: skip
_NORMS = {
    ("", "LayerNormalization"), ("", "RMSNormalization"), ("", "SimplifiedLayerNormalization"),
    ("com.microsoft", "SkipLayerNormalization"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
}  # fmt: skip
_SUM = 3  # the output of a norm with a skip that is the sum of its inputs, as wide as they are


class Matrices:
    """The Reshapes of a graph's values to matrices and back."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._ids = next((v for v in model.graph.inputs if v.name == "input_ids"), None)
        self._whole: ir.Value | None = None
        self._into: dict[int, ir.Node] = {}  # id of a whole value: the Reshape of it to a matrix
        self._back: dict[int, ir.Node] = {}  # id of a whole value: the Reshape that made it
        # id of a Reshape in `_back`: the shape and type that it restores
        self._declared: dict[int, tuple[ir.Shape, ir.TypeProtocol]] = {}
        self._row_wise: set[int] = set()  # ids of whole values that have no shape of their own

    def is_whole(self, x: ir.Value) -> bool:
        """Whether x has the batch and the tokens of this call, and one axis more."""
        if id(x) in self._row_wise:
            return True
        if x.shape is None or self._ids is None or self._ids.shape is None:
            return False
        return list(x.shape)[:-1] == list(self._ids.shape)

    def of(self, x: ir.Value, width: int) -> ir.Value:
        """(batch * tokens, width), once for all that read the whole x."""
        if id(x) not in self._into:
            sizes = integers(self._model, f"{x.name}.matrix_shape", [-1, width])
            made = ir.node("Reshape", [x, sizes], name=f"{x.name}.matrix")
            made.outputs[0].name = made.name
            producer = x.producer()
            if producer is None:
                self._model.graph.insert_before(self._model.graph[0], [made])
            else:
                self._model.graph.insert_after(producer, [made])
            self._into[id(x)] = made
        return self._into[id(x)].outputs[0]

    def whole(self, matrix: ir.Value, name: str, like: ir.Value) -> ir.Node:
        """A node, not in the graph yet, that gives (batch, tokens, width) again.

        The last axis of `like`, an activation or a weight, is as wide, and of the same type.
        """
        made = ir.node("Reshape", [matrix, self._sizes()], name=name)
        ids = self._ids.shape if self._ids is not None else None
        if like.shape is not None and like.type is not None and ids is not None:
            self._declared[id(made)] = ir.Shape([*ids, like.shape[-1]]), like.type
        made.outputs[0].name = name
        self._back[id(made.outputs[0])] = made
        return made

    def _sizes(self) -> ir.Value:
        """[batch, tokens, -1]"""
        if self._whole is None:
            assert self._ids is not None  # `is_whole` saw to it
            sizes = ir.node("Shape", [self._ids], name="slots.batch_and_tokens")
            sizes.outputs[0].name = sizes.name
            rest = integers(self._model, "slots.rest", [-1])
            made = ir.node("Concat", [sizes.outputs[0], rest], {"axis": 0}, name="slots.whole")
            made.outputs[0].name = made.name
            self._model.graph.insert_before(self._model.graph[0], [sizes, made])
            self._whole = made.outputs[0]
        return self._whole

    def declare(self) -> None:
        """State the shapes of what was made whole, after `settle`.

        ONNX Runtime infers a width of 0 behind an attention node whose packed input has no width,
        and its build for browsers refuses the graph.
        """
        for node in self._back.values():
            if node.graph is not None and id(node) in self._declared:
                node.outputs[0].shape, node.outputs[0].type = self._declared[id(node)]

    def settle(self) -> None:
        """Let nodes that act on each token independently read matrices, if that saves Reshapes.

        Call it after all slots are joined.
        """
        if not self._into:
            return
        self._model.graph.sort()
        chosen = {id(node): node for node in self._model.graph if self._acts_on_tokens(node)}
        made = {id(v): v for node in chosen.values() for v in node.outputs if self.is_whole(v)}
        if self._count(chosen, made) >= len(self._into) + len(self._back):
            return
        for node in chosen.values():
            for index, x in enumerate(node.inputs):
                if x is not None and self.is_whole(x) and id(x) not in made:
                    node.replace_input_with(index, self._matrix(x))
        for value in made.values():
            self._give_back(value, chosen)
        for key, node in list(self._into.items()):
            source = node.inputs[0]
            assert source is not None
            if key in made or key in self._back:
                matrix = source if key in made else self._matrix(source)
                node.outputs[0].replace_all_uses_with(matrix)
                self._model.graph.remove(node, safe=True)
        outputs = set(map(id, self._model.graph.outputs))
        for key, node in self._back.items():
            if node.graph is not None and key not in outputs and not node.outputs[0].uses():
                self._model.graph.remove(node, safe=True)
        self._model.graph.sort()

    def _acts_on_tokens(self, node: ir.Node) -> bool:
        """Whether the node computes the same on matrices; records which of its outputs are
        whole."""
        kind = (node.domain, node.op_type)
        if kind in _NORMS:
            axis = node.attributes.get("axis")
            if axis is not None and axis.value != -1:
                return False
            used = [o for n, o in enumerate(node.outputs) if n not in (0, _SUM) and o.uses()]
            if used or (kind[0] == "" and len(node.outputs) > _SUM):
                return False
        elif kind not in _EACH:
            return False
        inputs = [x for x in node.inputs if x is not None]
        whole = [x for x in inputs if self.is_whole(x)]
        if not whole or not all(self.is_whole(x) or _is_vector(x) for x in inputs):
            return False
        outputs = [o for n, o in enumerate(node.outputs) if n in (0, _SUM)]
        self._row_wise.update(map(id, outputs))
        return True

    def _matrix(self, x: ir.Value) -> ir.Value:
        """The matrix of a whole value that no chosen node computes."""
        if id(x) in self._back:
            matrix = self._back[id(x)].inputs[0]
            assert matrix is not None
            return matrix
        assert x.shape is not None
        width = x.shape[-1]
        return self.of(x, width if isinstance(width, int) else -1)

    def _count(self, chosen: dict[int, ir.Node], made: dict[int, ir.Value]) -> int:
        """The number of Reshapes there would be."""
        into: set[int] = set()
        for node in chosen.values():
            for x in node.inputs:
                if x is not None and self.is_whole(x) and id(x) not in made | self._back:
                    into.add(id(x))
        into |= {key for key in self._into if key not in made and key not in self._back}
        needed = [v for v in made.values() if any(self._others(v, chosen))]
        needed += [
            n.outputs[0] for n in self._back.values() if any(self._others(n.outputs[0], chosen))
        ]
        return len(into) + len(needed)

    def _others(self, value: ir.Value, chosen: dict[int, ir.Node]) -> Iterator[object]:
        """Readers of a value that need it whole: all but chosen nodes and Reshapes to a matrix."""
        into = self._into.get(id(value))
        yield from (n for n, _ in value.uses() if id(n) not in chosen and n is not into)
        yield from (o for o in self._model.graph.outputs if o is value)

    def _give_back(self, value: ir.Value, chosen: dict[int, ir.Node]) -> None:
        """Reshape a value that has become a matrix back for the readers that need it whole."""
        producer = value.producer()
        assert producer is not None
        if any(self._others(value, chosen)):
            whole = self.whole(value, f"{value.name}.whole", value)
            self._model.graph.insert_after(producer, [whole])
            own = [*chosen.values(), whole, *filter(None, [self._into.get(id(value))])]
            replace_uses(self._model, value, whole.outputs[0], own)
        value.shape = None


def _is_vector(x: ir.Value) -> bool:
    """A constant that is broadcast along the last axis."""
    producer = x.producer()
    constant = x.is_initializer() if producer is None else producer.op_type == "Constant"
    shape = x.shape if x.const_value is None else x.const_value.shape
    return constant and shape is not None and len(shape) < 2
