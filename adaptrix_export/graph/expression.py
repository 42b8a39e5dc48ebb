"""Expressions: how the value of an initializer is computed from tensors of the base, as data.

A front end may transpose a weight, split a fused one, or stack several. Each initializer is
therefore bound to an expression over tensor names, stored as nested lists so that the manifest can
contain it and a check can evaluate it again:

    ["tensor", name]                    ["transpose", [1, 0], e]      ["reshape", [shape], e]
    ["slice", axis, start, stop, e]     ["concat", axis, [e, ...]]    ["affine", scale, shift, e]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adaptrix_export.plan import Array

Expression = list[Any]


def tensor(name: str) -> Expression:
    return ["tensor", name]


def names(expression: Expression) -> Iterator[str]:
    """Every tensor name that the expression reads, in order, repeats included."""
    kind, *rest = expression
    if kind == "tensor":
        yield rest[0]
    elif kind == "concat":
        for part in rest[1]:
            yield from names(part)
    else:
        yield from names(rest[-1])


def evaluate(
    expression: Expression,
    read: Callable[[str], Array],
    rows: Callable[[str, int, int], Array] | None = None,
) -> Array:
    """The initializer's values; `read(name)` returns the values of a tensor.

    `rows(name, start, stop)`, if given, reads a range of rows only: one expert of many.

    Computes in the dtype that `read` returns. The result may be a view that is not contiguous.
    """
    kind, *rest = expression
    if kind == "tensor":
        return read(rest[0])
    if kind == "concat":
        axis, parts = rest
        return np.concatenate([evaluate(part, read, rows) for part in parts], axis=axis)
    if kind == "slice" and rest[0] == 0 and rest[-1][0] == "tensor" and rows is not None:
        return rows(rest[-1][1], rest[1], rest[2])
    value: Array = evaluate(rest[-1], read, rows)
    if kind == "transpose":
        return value.transpose(rest[0])
    if kind == "reshape":
        return value.reshape(rest[0])
    if kind == "slice":
        axis, start, stop = rest[:3]
        piece: Array = value[(slice(None),) * axis + (slice(start, stop),)]
        return piece
    if kind == "affine":
        scale, shift = rest[:2]
        computed: Array = value * value.dtype.type(scale) + value.dtype.type(shift)
        return computed
    raise ValueError(f"unknown weight expression {kind!r}")
