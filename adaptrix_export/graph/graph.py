"""The graph of a front end: ONNX whose weights are expressions over tensors of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptrix_export.graph.expression import Expression

if TYPE_CHECKING:
    import onnx_ir as ir  # imports sympy, which takes longer than all imports of a merge


@dataclass(frozen=True)
class Graph:
    """The result of a front end, in float32, with the inputs and outputs that README lists.

    `weights`: initializer name -> expression over base tensor names, for every initializer of
    `model` that has no constant value. `unused`: base tensors that the graph does not read.
    `reason`: why `auto` chose this front end, where it had a choice.
    """

    model: ir.Model
    weights: Mapping[str, Expression]
    frontend: str
    unused: tuple[str, ...]
    reason: str | None = None
