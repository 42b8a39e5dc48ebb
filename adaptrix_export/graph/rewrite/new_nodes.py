"""New nodes and constants of one rewrite, with names of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir


@dataclass
class NewNodes:
    """Collects nodes, which whoever rewrites puts into the graph, and adds their constants to it.

    `prefix` begins the name of each.
    """

    prefix: ClassVar[str]
    graph: ir.Graph
    nodes: list[ir.Node] = field(default_factory=list, kw_only=True)

    def add(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=attributes)
        node.name = node.outputs[0].name = f"{self.prefix}.{len(self.nodes)}.{kind.lower()}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer; the one of that name, if it was asked for before."""
        full = f"{self.prefix}.{name}"
        if full not in self.graph.initializers:
            self.graph.initializers[full] = ir.Value(
                name=full, shape=ir.Shape(value.shape),
                type=ir.TensorType(ir.tensor(value).dtype), const_value=ir.tensor(value, name=full),
            )  # fmt: skip
        return self.graph.initializers[full]
