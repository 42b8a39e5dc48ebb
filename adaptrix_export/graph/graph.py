"""A drawn graph: ONNX whose weights are expressions over the base's tensors, not values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptrix_export.graph.expression import Expression

if TYPE_CHECKING:
    import onnx_ir as ir  # with sympy, which takes longer to import than all that a merge needs


@dataclass(frozen=True)
class Graph:
    """What a front end draws, in float32, with the interface of the package's README.

    `weights`: initializer name -> expression over base tensor names, for every initializer of
    `model` that has no constant value. `unused`: base tensors that the graph does not read.
    `reason` says why `auto` took this front end, where it had a choice.
    """

    model: ir.Model
    weights: Mapping[str, Expression]
    frontend: str
    unused: tuple[str, ...]
    reason: str | None = None
