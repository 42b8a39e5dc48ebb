"""A pass over a graph: products with a quantized weight become MatMulNBits, the lookup of a
quantized embedding GatherBlockQuantized.

A head that shares the embedding's tensor shares its codes, too: both operators read the same bytes,
each in its own shape. Scales are fp16 initializers behind a Cast, which ONNX Runtime computes when
it loads the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from adaptrix_export.graph.expression import Expression
from adaptrix_export.graph.graph import Graph
from adaptrix_export.precision.blocks import Spec
from adaptrix_export.precision.formats import ACCURACY_FAST

DOMAIN = "com.microsoft"
VIEW = ".rows"  # ends the name of the codes as GatherBlockQuantized reads them


@dataclass(frozen=True)
class Reader:
    """A node that reads a weight; `chain` are the Transposes between them."""

    node: ir.Node
    chain: tuple[ir.Node, ...]

    @property
    def is_lookup(self) -> bool:
        return self.node.op_type == "Gather"


@dataclass(frozen=True)
class Weight:
    """An initializer that only products and lookups read. `expression` gives it as (n, k)."""

    name: str
    expression: Expression
    shape: tuple[int, int]
    readers: tuple[Reader, ...]

    @property
    def is_table(self) -> bool:
        """Whether rows of it are looked up."""
        return any(reader.is_lookup for reader in self.readers)


@dataclass(frozen=True)
class Stored:
    """The initializers of a quantized weight, by what they hold."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    shifts: ir.TensorProtocol | None = None  # (blocks, n)


def weights_of(graph: Graph, known: Callable[[str], bool]) -> tuple[list[Weight], dict[str, str]]:
    """The weights of a graph that can be quantized, and the other matrices with what keeps them.

    `known` says of a name in an expression that it is a tensor of the model, not of an adapter.
    """
    weights, floats = [], {}
    for name, expression in sorted(graph.weights.items()):
        value = graph.model.graph.initializers[name]
        if value.shape is None or len(value.shape) < 2 or not all(map(known, expression.names())):
            continue
        weight = _weight(graph, name, expression, value)
        if isinstance(weight, str):
            floats[name] = weight
        else:
            weights.append(weight)
    return weights, floats


def _weight(graph: Graph, name: str, expression: Expression, value: ir.Value) -> Weight | str:
    assert value.shape is not None
    if len(value.shape) != 2:
        return f"{len(value.shape)} dimensions"
    if expression.computes:
        return "computed"
    if value in graph.model.graph.outputs:
        return "an output of the graph"
    readers, layouts = [], set[bool]()
    for node, index, chain in _uses(value):
        by_rows = _reads_by_rows(node, index, len(chain) % 2 == 1)
        if by_rows is None:
            return f"read by {node.domain or 'ai.onnx'}::{node.op_type}"
        layouts.add(by_rows)
        readers.append(Reader(node, chain))
    if len(layouts) != 1:
        return "read in two ways" if layouts else "not read"
    by_rows = layouts.pop()
    rows, columns = value.shape.numpy()
    if not by_rows:
        rows, columns = columns, rows
    return Weight(name, expression if by_rows else expression.transposed(), (rows, columns),
                  tuple(readers))  # fmt: skip


def _uses(
    value: ir.Value, chain: tuple[ir.Node, ...] = ()
) -> Iterator[tuple[ir.Node, int, tuple[ir.Node, ...]]]:
    for node, index in list(value.uses()):
        if node.op_type == "Transpose" and not node.domain and len(chain) < 1:
            yield from _uses(node.outputs[0], (*chain, node))
        else:
            yield node, index, chain


def _reads_by_rows(node: ir.Node, index: int, is_turned: bool) -> bool | None:
    """Whether the rows of the initializer are outputs of the product, or what is looked up; None
    for a node that no operator with blocks can replace."""
    if node.domain:
        return None
    if node.op_type == "MatMul" and index == 1:
        return is_turned
    if node.op_type == "Gemm" and index == 1:
        if _number(node, "transA", 0) or _number(node, "alpha", 1) != 1:
            return None
        if _number(node, "beta", 1) != 1 and len(node.inputs) > 2:
            return None
        return is_turned != bool(_number(node, "transB", 0))
    if node.op_type == "Gather" and index == 0 and not is_turned and not _number(node, "axis", 0):
        return True
    return None


def _number(node: ir.Node, name: str, default: float) -> float:
    if name not in node.attributes:
        return default
    value = node.attributes[name].value
    assert isinstance(value, (int, float))
    return value


def put_blocks(model: ir.Model, weight: Weight, spec: Spec, stored: Stored) -> int:
    """Replace whoever reads the weight; returns the number of nodes. The initializer is gone.

    The codes that a lookup reads are an initializer `<name>.codes.rows` without a value: it gets
    the bytes of `<name>.codes` when those have a place in a file (`views`).
    """
    graph = model.graph
    scales = _scales(model, weight, stored)
    zeros = stored.zeros and _initializer(model, f"{weight.name}.zeros", stored.zeros)
    codes = _initializer(model, f"{weight.name}.codes", stored.codes)
    rows, columns = weight.shape
    for reader in weight.readers:
        node = reader.node
        if reader.is_lookup:
            ids = node.inputs[1]
            assert ids is not None
            made = ir.node(
                "GatherBlockQuantized", [_view(model, codes, spec, weight.shape), ids, scales],
                attributes={"gather_axis": 0, "quantize_axis": 1, "block_size": spec.block,
                            "bits": spec.bits},
                domain=DOMAIN,
            )  # fmt: skip
        else:
            inputs = [node.inputs[0], codes, scales, *([zeros] if zeros else [])]
            made = ir.node(
                "MatMulNBits", inputs,
                attributes={"K": columns, "N": rows, "bits": spec.bits, "block_size": spec.block,
                            "accuracy_level": ACCURACY_FAST},
                domain=DOMAIN,
            )  # fmt: skip
        _put(model, node, made)
        if stored.shifts is not None:
            _add_shifts(model, made, weight, spec, stored.shifts)
    for chain in {id(n): n for reader in weight.readers for n in reader.chain}.values():
        graph.remove(chain, safe=True)
    if not any(value is codes for node in graph for value in node.inputs):
        # only looked up: one shape is enough
        view = graph.initializers[f"{codes.name}{VIEW}"]
        assert view.shape is not None
        view.const_value = _reshaped(stored.codes, tuple(view.shape.numpy()))
        del graph.initializers[str(codes.name)]
    del graph.initializers[weight.name]
    model.opset_imports.setdefault(DOMAIN, 1)
    return len(weight.readers)


def _add_shifts(
    model: ir.Model, made: ir.Node, weight: Weight, spec: Spec, shifts: ir.TensorProtocol
) -> None:
    """Add to a product what the blocks' shifts give: the sums of its inputs by block, times them.

    Products that read one value share its sums.
    """
    graph, inputs, output = model.graph, made.inputs[0], made.outputs[0]
    assert inputs is not None
    name = f"{weight.name}.shifts"
    values = graph.initializers.get(name) or _initializer(model, name, shifts)
    members = _members(model, weight.shape[1], spec.block)
    sums = next((n for n, i in inputs.uses() if i == 0 and n.inputs[-1] is members), None)
    nodes = []
    if sums is None:
        sums = ir.node("MatMul", [inputs, members], name=f"{made.name}.block_sums")
        sums.outputs[0].name, sums.outputs[0].type = sums.name, output.type
        producer = inputs.producer()
        if producer is None:
            graph.insert_before(graph[0], [sums])
        else:
            graph.insert_after(producer, [sums])
    shift = ir.node("MatMul", [sums.outputs[0], values], name=f"{made.name}.shift")
    shift.outputs[0].name, shift.outputs[0].type = shift.name, output.type
    total = ir.node("Add", [output, shift.outputs[0]], name=f"{made.name}.shifted")
    total.outputs[0].shape, total.outputs[0].type = output.shape, output.type
    nodes += [shift, total]
    output.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    total.outputs[0].name, output.name = output.name, f"{output.name}.codes"
    graph.insert_after(made, nodes)


def _members(model: ir.Model, columns: int, block: int) -> ir.Value:
    """(columns, blocks): 1 where a column belongs to a block."""
    name = f"block_members.{columns}.{block}"
    if name not in model.graph.initializers:
        _initializer(model, name, _member_values(columns, block))
    return model.graph.initializers[name]


@lru_cache(maxsize=16)  # one tensor for all graphs, which then share its bytes in the data file
def _member_values(columns: int, block: int) -> ir.TensorProtocol:
    own = np.repeat(np.eye(-(-columns // block), dtype=np.float32), block, axis=0)[:columns]
    return ir.tensor(own)


def _put(model: ir.Model, node: ir.Node, made: ir.Node) -> None:
    """`made` in the place of `node`; what a Gemm added is added by a node of its own."""
    made.name = node.name
    output = node.outputs[0]
    new, nodes = made.outputs[0], [made]
    added = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if added is not None:
        total = ir.node("Add", [new, added], name=f"{node.name}.sum")
        new.name, new.type = f"{output.name}.product", output.type
        new, nodes = total.outputs[0], [made, total]
    new.name, new.shape, new.type = output.name, output.shape, output.type
    model.graph.insert_after(node, nodes)
    for user, index in list(output.uses()):
        user.replace_input_with(index, new)
    for index, value in enumerate(model.graph.outputs):
        if value is output:
            model.graph.outputs[index] = new
    output.name = f"{output.name}.float"
    model.graph.remove(node, safe=True)


def _scales(model: ir.Model, weight: Weight, stored: Stored) -> ir.Value:
    scales = _initializer(model, f"{weight.name}.scales", stored.scales)
    if stored.scales.dtype == ir.DataType.FLOAT:
        return scales
    cast = ir.node("Cast", [scales], attributes={"to": ir.DataType.FLOAT})
    cast.name = cast.outputs[0].name = f"{weight.name}.scales.float"
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = scales.shape
    model.graph.insert_before(model.graph[0], [cast])
    return cast.outputs[0]


def _initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )  # fmt: skip
    model.graph.initializers[name] = value
    return value


def _view(model: ir.Model, codes: ir.Value, spec: Spec, shape: tuple[int, int]) -> ir.Value:
    name = f"{codes.name}{VIEW}"
    if name not in model.graph.initializers:
        packed = (shape[0], shape[1] * spec.bits // 8)
        value = ir.Value(name=name, shape=ir.Shape(packed), type=ir.TensorType(ir.DataType.UINT8))
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _reshaped(tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().reshape(shape)), dtype=tensor.dtype, shape=ir.Shape(shape)
    )


def place_views(model: ir.Model) -> None:
    """After the data file is written: the codes that lookups read are the bytes of the others."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None and name.endswith(VIEW):
            codes = model.graph.initializers[name.removesuffix(VIEW)].const_value
            assert isinstance(codes, ir.ExternalTensor)
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                location=codes.location, offset=codes.offset, length=codes.length, name=name,
                dtype=ir.DataType.UINT8, shape=value.shape, base_dir=codes.base_dir,
            )  # fmt: skip
