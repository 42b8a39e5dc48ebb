"""Weights that keep the codes of their file: what an adapter was trained on is what runs.

A block of Q4_1 adds its minimum m to each value. With the zero point in the middle of the codes,

    code * d + m = (code - 8) * d + (m + 8 d)

and what is in brackets at the end is a shift of the block: a product with it is a product of the
sums of the inputs by block.
"""

from __future__ import annotations

import numpy as np

from adaptrix_export.graph.expression import Expression, TensorRef
from adaptrix_export.load.quantized.gguf_base import DequantizedTensor
from adaptrix_export.load.quantized.gguf_blocks import BLOCK
from adaptrix_export.plan import Plan
from adaptrix_export.precision.blocks import Blocks, Spec
from adaptrix_export.precision.nbits import Weight


def stored_spec(plan: Plan, weight: Weight) -> Spec | str:
    """How the file stores a weight, or why it cannot be kept like that."""
    specs = set()
    for piece in weight.expression.stacked():
        tensor = _tensor(plan, piece)
        if tensor is None or tensor.format is None:
            return "the file stores it in no format that an operator reads"
        if tensor.name in plan.changes():
            return "an adapter changes it"
        specs.add(Spec(tensor.format.bits, BLOCK, True, tensor.format.has_minimum))
    if len(specs) > 1:
        return "the file stores its parts in different formats"
    spec = specs.pop()
    return (
        "a lookup reads it, and its blocks have minima"
        if (spec.shifted and weight.is_table)
        else spec
    )


def stored_blocks(plan: Plan, piece: Expression, spec: Spec) -> Blocks:
    """The file's codes of a piece that `stored_spec` found a spec for."""
    tensor = _tensor(plan, piece)
    assert tensor is not None, piece
    blocks = tensor.blocks()
    shifts = None
    if blocks.minima is not None:
        shifts = blocks.minima.astype(np.float32)
        shifts += np.float32(spec.middle) * blocks.scales.astype(np.float32)
    return Blocks(spec, blocks.codes, blocks.scales, None, shifts)


def _tensor(plan: Plan, piece: Expression) -> DequantizedTensor | None:
    if not isinstance(piece, TensorRef):
        return None
    tensor = plan.base.tensors[plan.base.tied.get(piece.name, piece.name)]
    return tensor if isinstance(tensor, DequantizedTensor) else None
