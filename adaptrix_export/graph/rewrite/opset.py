"""Lower a graph to the oldest opset and IR version that express it.

Front ends write for the newest runtime. Most new versions of operators only accept more element
types. `_WIDENED` lists the operators for which that holds for every version since `OLDEST`; if a
node uses no new attribute and no new input, the older version computes the same. A norm that only
new opsets have is decomposed into the pattern that ONNX Runtime fuses into its own operator when it
loads a graph (SimplifiedLayerNormFusion; the same kernel, so the same bits).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

OLDEST = 18  # ReduceMean takes its axes as an input from here on; ONNX Runtime 1.14
# Operators whose versions after OLDEST only take more element types, up to opset 26.
_WIDENED = frozenset(
    "Cast CastLike Constant ConstantOfShape Conv Cos Dropout Equal Flatten HardSigmoid Identity If "
    "IsInf IsNaN Loop Pad ReduceMax ReduceMin Reshape Round Scan Shape Sin Size Softplus Squeeze "
    "TopK Transpose Unsqueeze".split()
)
# Element types that some of the older versions do not take.
_RECENT_TYPES = frozenset(
    kind for kind in ir.DataType if kind.name.startswith(("FLOAT8", "FLOAT4", "INT4", "UINT4"))
    or kind.name in ("INT2", "UINT2")
)  # fmt: skip
_BUILT_IN = "com.microsoft"  # the domain of ONNX Runtime's own operators
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")


def lower_opset(model: ir.Model) -> int:
    """Lower the model's opset and IR version in place; returns the number of decomposed norms.

    Unused functions are removed, and so are functions that define ONNX Runtime's own operators for
    other runtimes: ONNX Runtime checks their opset, too, and refuses a graph for it.
    """
    for key in [key for key in model.functions if key[0] == _BUILT_IN]:
        del model.functions[key]
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    spelled = sum([_spell_out(node) for node in list(_nodes(model)) if _is_norm(node)])
    common.RemoveUnusedOpsetsPass()(model)
    current = model.opset_imports.get("", OLDEST)
    wide = bool(_RECENT_TYPES & _element_types(model))
    target = max([OLDEST, *(_oldest(n, current, wide) for n in _nodes(model) if n.domain == "")])
    if target < current:
        _set_opset(model, current, target)
    model.ir_version = min(model.ir_version, _ir_version(model))
    return spelled


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those of subgraphs and functions too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _element_types(model: ir.Model) -> set[ir.DataType]:
    """The known element types of the model's values, and the target types of its casts."""
    graph = model.graph
    types = {v.dtype for v in (*graph.inputs, *graph.outputs) if v.dtype is not None}
    types |= {v.dtype for v in graph.initializers.values() if v.dtype is not None}
    for node in _nodes(model):
        types |= {v.dtype for v in node.outputs if v.dtype is not None}
        if node.op_type == "Cast":
            types.add(ir.DataType(node.attributes["to"].as_int()))
    return types


def _oldest(node: ir.Node, current: int, wide: bool) -> int:
    """The oldest opset in which the node means what it means in `current`."""
    schema = onnx.defs.get_schema(node.op_type, current, "")
    while schema.since_version > OLDEST and node.op_type in _WIDENED and not wide:
        older = onnx.defs.get_schema(node.op_type, schema.since_version - 1, "")
        if len(node.inputs) > older.max_input or len(node.outputs) > older.max_output:
            break
        if not set(_explicit_attributes(node, schema)) <= set(older.attributes):
            break
        schema = older
    return schema.since_version


def _explicit_attributes(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterable[str]:
    """The attributes whose values differ from the operator's defaults."""
    for name, attribute in node.attributes.items():
        default = schema.attributes[name].default_value
        silent = default.type != onnx.AttributeProto.UNDEFINED
        if not silent or onnx.helper.get_attribute_value(default) != _raw(attribute):
            yield name


def _raw(attribute: ir.Attr) -> object:
    value = attribute.value
    return value.encode() if isinstance(value, str) else value


def _set_opset(model: ir.Model, current: int, target: int) -> None:
    for node in _nodes(model):
        if node.domain == "" and node.op_type in _WIDENED:
            explicit = set(
                _explicit_attributes(node, onnx.defs.get_schema(node.op_type, current, ""))
            )
            for name in [n for n in node.attributes if n not in explicit]:
                del node.attributes[name]
    model.graph.opset_imports[""] = target
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = target


def _ir_version(model: ir.Model) -> int:
    """The oldest IR version for the opset, 8 at the least: functions came with it."""
    opset = onnx.helper.make_opsetid("", model.opset_imports.get("", OLDEST))
    return max(8, int(onnx.helper.find_min_ir_version_for([opset])))


def _is_norm(node: ir.Node) -> bool:
    """A root-mean-square norm over the last axis, in float32, with one output that is read."""
    axis = node.attributes.get("axis")
    return (
        node.op_type in _NORMS
        and node.domain == ""
        and (axis is None or axis.as_int() == -1)
        and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    )


def _spell_out(node: ir.Node) -> int:
    """x / sqrt(mean(x * x) + epsilon) * scale in place of the norm; returns 1."""
    x, scale = node.inputs[0], node.inputs[1]
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    graph = node.graph
    assert graph is not None
    assert x is not None
    assert scale is not None
    made: list[ir.Node] = []

    def constant(number: float | list[int], name: str) -> ir.Value:
        kind = ir.DataType.FLOAT if isinstance(number, float) else ir.DataType.INT64
        value = ir.tensor(number, dtype=kind)
        new = ir.node("Constant", [], attributes={"value": value}, name=f"{node.name}.{name}")
        new.outputs[0].name = f"{node.outputs[0].name}.{name}"
        new.outputs[0].type = ir.TensorType(kind)
        new.outputs[0].shape = ir.Shape([len(number)] if isinstance(number, list) else [])
        made.append(new)
        return new.outputs[0]

    def add(kind: str, *inputs: ir.Value, name: str, **attributes: int) -> ir.Value:
        new = ir.node(kind, inputs, attributes=attributes or None, name=f"{node.name}.{name}")
        new.outputs[0].name = f"{node.outputs[0].name}.{name}"
        new.outputs[0].type = x.type
        made.append(new)
        return new.outputs[0]

    square = add("Pow", x, constant(2.0, "two"), name="square")
    mean = add("ReduceMean", square, constant([-1], "last"), name="mean", keepdims=1)
    shifted = add("Add", mean, constant(epsilon, "epsilon"), name="shifted")
    divided = add("Div", x, add("Sqrt", shifted, name="root"), name="divided")
    scaled = add("Mul", divided, scale, name="scaled")
    old = node.outputs[0]
    name = old.name
    scaled.shape, scaled.type = old.shape, old.type
    graph.insert_before(node, made)
    old.replace_all_uses_with(scaled, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    scaled.name = name
    return 1
