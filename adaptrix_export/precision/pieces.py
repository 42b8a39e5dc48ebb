"""A weight of a graph as the matrices that it is stacked from, a tensor of the base each.

A matrix product reads its weight as (k, n), often several modules side by side. Quantized, it is
(n, k), the outputs as rows, and rows are independent: each piece is quantized by itself.
"""

from __future__ import annotations

from adaptrix_export.graph.expression import Expression, names

_TURN = [1, 0]


def turned(expression: Expression) -> Expression:
    """The transpose of a matrix, with the transposition moved towards the tensors."""
    kind, *rest = expression
    if kind == "transpose" and rest[0] == _TURN:
        inner: Expression = rest[1]
        return inner
    if kind == "concat":
        return ["concat", 1 - rest[0], [turned(part) for part in rest[1]]]
    if kind == "slice":
        axis, start, stop, inner = rest
        return ["slice", 1 - axis, start, stop, turned(inner)]
    return ["transpose", _TURN, expression]


def pieces(expression: Expression) -> list[Expression]:
    """What a matrix is stacked from, top to bottom."""
    kind, *rest = expression
    if kind == "concat" and rest[0] == 0:
        return [piece for part in rest[1] for piece in pieces(part)]
    return [expression]


def module_of(expression: Expression) -> str:
    """The path of the module whose weight comes first in an expression."""
    first = next(names(expression))
    return first.rpartition(".")[0] or first
