"""Record what a front end does to weights, without the weights.

mobius renames, transposes, splits and stacks a checkpoint's tensors in `preprocess_weights`, an
ordinary function on torch tensors. Called with `Recorded` tensors, which have a shape and no
storage, it returns expressions (`expression.py`), which are evaluated later, one initializer at a
time, on merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from adaptrix_export.compat.torch import RESHAPE_ALIAS, TO_COPY, UNSAFE_VIEW, without_storage
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import Affine, Concat, Expression, Reshape, Slice, Transpose

_aten = torch.ops.aten


class Recorded(torch.Tensor):
    """A tensor without values that records the expression it was computed with."""

    expression: Expression

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], expression: Expression) -> Recorded:
        made = without_storage(cls, shape)
        assert isinstance(made, Recorded)
        made.expression = expression
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as a plain function
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        record = _RECORDS.get(function)
        if record is None:
            first = next((a for a in args if isinstance(a, Recorded)), None)
            source = None if first is None else next(first.expression.names())
            raise UnsupportedError(
                f"native front end: {source or function}",
                f"a weight computed with {function}", "moves, stacks and constant factors",
                "build with --frontend traced, or report the model type",
            )  # fmt: skip
        return record(*args, **(kwargs or {}))


def _permute(x: Recorded, dims: list[int]) -> Recorded:
    dims = [d % x.dim() for d in dims]
    return Recorded(tuple(x.shape[d] for d in dims), Transpose(tuple(dims), x.expression))


def _transpose(x: Recorded, a: int, b: int) -> Recorded:
    dims = list(range(x.dim()))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(x, dims)


def _reshape(x: Recorded, shape: list[int]) -> Recorded:
    sizes = [int(s) for s in torch.empty(x.shape, device="meta").reshape(shape).shape]
    return Recorded(tuple(sizes), Reshape(tuple(sizes), x.expression))


def _slice(
    x: Recorded, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Recorded:
    if step != 1:
        raise UnsupportedError("native front end", f"a weight cut in steps of {step}", "steps of 1")
    dim %= x.dim()
    first, last, _ = slice(start, stop).indices(x.shape[dim])
    shape = (*x.shape[:dim], max(0, last - first), *x.shape[dim + 1 :])
    return Recorded(shape, Slice(dim, first, last, x.expression))


def _split(x: Recorded, size: int | list[int], dim: int = 0) -> list[Recorded]:
    whole = x.shape[dim % x.dim()]
    sizes = size if isinstance(size, list) else [size] * -(-whole // size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(x, dim, at, at + n) for at, n in zip(starts, sizes, strict=True)]


def _select(x: Recorded, dim: int, index: int) -> Recorded:
    dim %= x.dim()
    index %= x.shape[dim]
    return _reshape(
        _slice(x, dim, index, index + 1), [s for i, s in enumerate(x.shape) if i != dim]
    )


def _cat(parts: list[Recorded], dim: int = 0) -> Recorded:
    dim %= parts[0].dim()
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return Recorded(tuple(shape), Concat(dim, tuple(p.expression for p in parts)))


def _stack(parts: list[Recorded], dim: int = 0) -> Recorded:
    dim %= parts[0].dim() + 1
    return _cat([_unsqueeze(p, dim) for p in parts], dim)


def _unsqueeze(x: Recorded, dim: int) -> Recorded:
    shape = list(x.shape)
    shape.insert(dim % (x.dim() + 1), 1)
    return _reshape(x, shape)


def _squeeze(x: Recorded, dim: int | None = None) -> Recorded:
    drop = range(x.dim()) if dim is None else [dim % x.dim()]
    return _reshape(x, [s for i, s in enumerate(x.shape) if not (i in drop and s == 1)])


def _same(x: Recorded, *_: Any, **__: Any) -> Recorded:
    """Copies, casts and detaches: the expression is evaluated in the dtype that is written."""
    return Recorded(tuple(x.shape), x.expression)


def _affine(scale: float, shift: float) -> Callable[[Recorded], Recorded]:
    return lambda x: Recorded(tuple(x.shape), Affine(scale, shift, x.expression))


def _number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, torch.Tensor) and not isinstance(value, Recorded) and value.numel() == 1:
        return float(value)
    raise UnsupportedError("native front end", "two weights combined", "one weight and a number")


def _times(x: Any, y: Any) -> Recorded:
    x, y = (x, y) if isinstance(x, Recorded) else (y, x)
    return _affine(_number(y), 0.0)(x)


def _plus(x: Any, y: Any, alpha: float = 1) -> Recorded:
    if not isinstance(x, Recorded):
        return _affine(alpha, _number(x))(y)
    return _affine(1.0, alpha * _number(y))(x)


_RECORDS: dict[Any, Callable[..., Any]] = {
    _aten.t.default: lambda x: _permute(x, list(range(x.dim()))[::-1]),
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.view.default: _reshape,
    UNSAFE_VIEW: _reshape,
    _aten.reshape.default: _reshape,
    RESHAPE_ALIAS: lambda x, shape, stride: _reshape(x, shape),
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.select.int: _select,
    _aten.unbind.int: lambda x, dim=0: [_select(x, dim, i) for i in range(x.shape[dim])],
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    TO_COPY: _same,
    _aten.mul.Tensor: _times,
    _aten.mul.Scalar: _times,
    _aten.add.Tensor: _plus,
    _aten.add.Scalar: _plus,
}
