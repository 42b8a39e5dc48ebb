"""Which ONNX Runtime a graph needs: the oldest that has its opset, IR version and operators.

The rows were measured with 1.17.3, 1.18.1, 1.19.2, 1.20.1, 1.21.1, 1.22.1, 1.23.2, 1.24.1, 1.31.1
and 1.32.0: opsets and IR versions by loading a graph of one node, operators from the schemas of
each release (`get_all_operator_schema`), their kernels on the CPU by running one node.
What no row knows needs the release that the artifact was proved with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

OLDEST = "1.18"  # of those that the artifacts are tested with
EMPTY_SLOTS = "1.20"  # Gemm over no columns, as in a slot without an adapter; an error before
_BUILT_IN = "com.microsoft"
_OPSETS = {20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.31",
           27: "1.32"}  # fmt: skip
_IR_VERSIONS = {9: "1.17", 10: "1.18", 11: "1.23", 12: "1.24", 13: "1.24", 14: "1.32"}


@dataclass(frozen=True)
class Operator:
    """An operator of ONNX Runtime's own. `inputs` and `attributes`: how it was in OLDEST, or in
    `since`; `later`: release -> the number of inputs or the attributes that came with it; `values`:
    (attribute, value) -> the release whose kernel takes it."""

    inputs: int
    attributes: str
    since: str = OLDEST
    later: Mapping[str, int | str] = field(default_factory=dict)
    values: Mapping[tuple[str, int], str] = field(default_factory=dict)


_OPERATORS = {
    "BiasGelu": Operator(2, ""),
    "FastGelu": Operator(2, ""),
    "FusedMatMul": Operator(2, "alpha transA transB transBatchA transBatchB"),
    "GatherBlockQuantized": Operator(
        4, "block_size gather_axis quantize_axis", "1.20", {"1.23": "bits"}
    ),
    "Gelu": Operator(1, ""),
    "GroupQueryAttention": Operator(
        9,
        "do_rotary kv_num_heads local_window_size num_heads rotary_interleaved scale",
        later={"1.19": "smooth_softmax", "1.20": "softcap", "1.22": 11},
    ),
    "MatMulNBits": Operator(
        5,
        "K N accuracy_level bits block_size",
        later={"1.19": 6},
        values={("bits", 8): "1.23", ("bits", 2): "1.24"},
    ),
    "MultiHeadAttention": Operator(
        8, "mask_filter_value num_heads scale unidirectional", later={"1.22": 10}
    ),
    "QuickGelu": Operator(1, "alpha"),
    "RotaryEmbedding": Operator(
        4, "interleaved num_heads rotary_embedding_dim scale", later={"1.19": "is_packed_batching"}
    ),
    "SkipLayerNormalization": Operator(5, "epsilon"),
    "SkipSimplifiedLayerNormalization": Operator(4, "epsilon"),
}


def runtime_needs(folder: Path) -> dict[str, Any] | None:
    """What the manifest says of the graphs in an artifact's folder; None where there are none.

    `minimum` is the oldest ONNX Runtime for all of them.
    """
    files = sorted(folder.glob("*.onnx")) + sorted(folder.glob("onnx/*.onnx"))
    graphs, releases = {}, [OLDEST]
    for path in files:
        model = ir.load(path)
        graphs[path.relative_to(folder).as_posix()] = {
            "opset": model.opset_imports.get("", 0),
            "ir_version": model.ir_version,
        }
        releases.append(oldest_runtime(model))
    return {"minimum": max(releases, key=release), "graphs": graphs} if graphs else None


def oldest_runtime(model: ir.Model) -> str:
    """The oldest release of ONNX Runtime that is known to run the model, as `1.18`."""
    releases = [OLDEST, *_by_number(model.opset_imports.get("", 0), _OPSETS)]
    releases += _by_number(model.ir_version, _IR_VERSIONS)
    if any(0 in _sizes(value) for value in model.graph.inputs if value.is_initializer()):
        releases.append(EMPTY_SLOTS)
    nodes = [*model.graph.all_nodes()]
    for function in model.functions.values():
        nodes += function.all_nodes()
    for node in nodes:
        releases += _by_operator(node) if node.domain == _BUILT_IN else []
    return max(releases, key=release)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """The sizes of an input's default."""
    default = value.const_value
    return () if default is None else tuple(default.shape.numpy())


def release(version: str) -> tuple[int, ...]:
    """`1.18.1` as numbers, for comparing."""
    return tuple(int(part) for part in version.split(".")[:2])


def _by_number(number: int, rows: Mapping[int, str]) -> list[str]:
    """The row of `number`; past the last row nothing is known."""
    if number > max(rows):
        return [_installed()]
    return [rows[number]] if number in rows else []


def _by_operator(node: ir.Node) -> list[str]:
    row = _OPERATORS.get(node.op_type)
    if row is None:
        return [_installed()]
    return [row.since, *_inputs(node, row), *_attributes(node, row)]


def _inputs(node: ir.Node, row: Operator) -> Iterator[str]:
    """A release for the inputs past those of the row."""
    count = len(node.inputs)
    while count and node.inputs[count - 1] is None:
        count -= 1
    if count <= row.inputs:
        return
    later = [r for r, n in row.later.items() if isinstance(n, int) and count <= n]
    yield min(later, key=release) if later else _installed()


def _attributes(node: ir.Node, row: Operator) -> Iterator[str]:
    known = dict.fromkeys(row.attributes.split(), row.since)
    known |= {
        n: r for r, names in row.later.items() if isinstance(names, str) for n in names.split()
    }
    for name, attribute in node.attributes.items():
        yield known.get(name) or _installed()
        if attribute.type == ir.AttributeType.INT:
            yield row.values.get((name, attribute.as_int()), row.since)


def _installed() -> str:
    import onnxruntime

    return ".".join(onnxruntime.__version__.split(".")[:2])
