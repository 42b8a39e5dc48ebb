"""How a graph's initializer is made from the base's tensors: data, not code.

A front end may transpose a weight, cut a fused one apart, or stack several. Each initializer is
therefore bound to an expression over tensor names, kept as nested lists so that the manifest can
carry it and a check can evaluate it again:

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
    """The initializer's values, with `read` giving the values of a tensor by name.

    `rows`, where given, reads a run of rows alone: one expert of many.

    Works in the dtype that `read` returns. The result may be a view; it is contiguous only if
    the caller makes it so.
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
