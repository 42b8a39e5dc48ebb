"""How a graph's initializer is made from the base's tensors: data, not code.

A front end may transpose a weight, cut a fused one apart, or stack several. Each initializer is
therefore bound to an expression over tensor names, which is evaluated when the weights are written,
and once more when they are checked. Manifests and jobs carry expressions as nested lists:

    ["tensor", name]                    ["transpose", [1, 0], e]      ["reshape", [shape], e]
    ["slice", axis, start, stop, e]     ["concat", axis, [e, ...]]    ["affine", scale, shift, e]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptrix_export.errors import SourceError
from adaptrix_export.plan import Array

Shape = tuple[int, ...]
Read = Callable[[str], Array]
ReadRows = Callable[[str, int, int], Array]
_MATRIX = (1, 0)


class Expression(ABC):
    """An array that is made from tensors of the base. Equal expressions give equal values."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Expression, ...]:
        """The expressions that this one is made from."""

    @abstractmethod
    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        """The values, with `read` giving those of a tensor by name, in the dtype that it returns.

        `rows`, where given, reads a range of rows only: one expert of many. The result may be a
        view; it is contiguous only if the caller makes it so.
        """

    @abstractmethod
    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """The shape of the values, with `shape_of` giving that of a tensor by name."""

    @abstractmethod
    def as_json(self) -> list[Any]:
        """The expression as nested lists; `expression_of` is the inverse."""

    def names(self) -> Iterator[str]:
        """Every tensor name that the expression reads, in order, repeats included."""
        for part in self.parts:
            yield from part.names()

    @property
    def computes(self) -> bool:
        """Whether values are changed, and not just moved."""
        return any(part.computes for part in self.parts)

    @property
    def module(self) -> str:
        """The path of the module whose weight is read first."""
        first = next(self.names())
        return first.rpartition(".")[0] or first

    def transposed(self) -> Expression:
        """The transpose of a matrix, with the transposition moved towards the tensors."""
        return Transpose(_MATRIX, self)

    def stacked(self) -> tuple[Expression, ...]:
        """What the rows of a matrix are stacked from, top to bottom."""
        return (self,)


@dataclass(frozen=True)
class TensorRef(Expression):
    """A tensor of the base, by name."""

    name: str

    @property
    def parts(self) -> tuple[Expression, ...]:
        return ()

    def names(self) -> Iterator[str]:
        yield self.name

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        return read(self.name)

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        return shape_of(self.name)

    def as_json(self) -> list[Any]:
        return ["tensor", self.name]


@dataclass(frozen=True)
class Transpose(Expression):
    """Axes in another order: axis i of the value is axis `order[i]` of `of`."""

    order: tuple[int, ...]
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        return self.of.evaluate(read, rows).transpose(self.order)

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        inner = self.of.shape(shape_of)
        return tuple(inner[axis] for axis in self.order)

    def as_json(self) -> list[Any]:
        return ["transpose", list(self.order), self.of.as_json()]

    def transposed(self) -> Expression:
        return self.of if self.order == _MATRIX else super().transposed()


@dataclass(frozen=True)
class Reshape(Expression):
    """The same values in row-major order, in another shape."""

    sizes: Shape
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        return self.of.evaluate(read, rows).reshape(self.sizes)

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        return self.sizes

    def as_json(self) -> list[Any]:
        return ["reshape", list(self.sizes), self.of.as_json()]


@dataclass(frozen=True)
class Slice(Expression):
    """The range start..stop of an axis."""

    axis: int
    start: int
    stop: int
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        if rows is not None and self.axis == 0 and isinstance(self.of, TensorRef):
            return rows(self.of.name, self.start, self.stop)
        cut = (slice(None),) * self.axis + (slice(self.start, self.stop),)
        piece: Array = self.of.evaluate(read, rows)[cut]
        return piece

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        inner = self.of.shape(shape_of)
        return (*inner[: self.axis], self.stop - self.start, *inner[self.axis + 1 :])

    def as_json(self) -> list[Any]:
        return ["slice", self.axis, self.start, self.stop, self.of.as_json()]

    def transposed(self) -> Expression:
        return Slice(1 - self.axis, self.start, self.stop, self.of.transposed())


@dataclass(frozen=True)
class Concat(Expression):
    """Several values joined along an axis."""

    axis: int
    of: tuple[Expression, ...]

    @property
    def parts(self) -> tuple[Expression, ...]:
        return self.of

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        return np.concatenate([part.evaluate(read, rows) for part in self.of], axis=self.axis)

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        shapes = [part.shape(shape_of) for part in self.of]
        length = sum(shape[self.axis] for shape in shapes)
        return (*shapes[0][: self.axis], length, *shapes[0][self.axis + 1 :])

    def as_json(self) -> list[Any]:
        return ["concat", self.axis, [part.as_json() for part in self.of]]

    def transposed(self) -> Expression:
        return Concat(1 - self.axis, tuple(part.transposed() for part in self.of))

    def stacked(self) -> tuple[Expression, ...]:
        if self.axis != 0:
            return super().stacked()
        return tuple(piece for part in self.of for piece in part.stacked())


@dataclass(frozen=True)
class Affine(Expression):
    """`scale * values + shift`, in the dtype of the values."""

    scale: float
    shift: float
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)

    @property
    def computes(self) -> bool:
        return True

    def evaluate(self, read: Read, rows: ReadRows | None = None) -> Array:
        values = self.of.evaluate(read, rows)
        kind = values.dtype.type
        computed: Array = values * kind(self.scale) + kind(self.shift)
        return computed

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        return self.of.shape(shape_of)

    def as_json(self) -> list[Any]:
        return ["affine", self.scale, self.shift, self.of.as_json()]


_MAKERS: dict[str, Callable[..., Expression]] = {
    "tensor": lambda name: TensorRef(str(name)),
    "transpose": lambda order, of: Transpose(tuple(order), _parsed(of)),
    "reshape": lambda sizes, of: Reshape(tuple(sizes), _parsed(of)),
    "slice": lambda axis, start, stop, of: Slice(axis, start, stop, _parsed(of)),
    "concat": lambda axis, of: Concat(axis, tuple(map(_parsed, of))),
    "affine": lambda scale, shift, of: Affine(scale, shift, _parsed(of)),
}


def _parsed(document: Any) -> Expression:
    kind, *rest = document
    return _MAKERS[kind](*rest)


def expression_of(document: Any, place: str = "weights") -> Expression:
    """The expression that `as_json` gave as nested lists.

    Raises SourceError, which names `place`, for anything else.
    """
    try:
        return _parsed(document)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            place, f"{str(document)[:80]!r}", f"an expression: {', '.join(_MAKERS)}",
            "build the artifact again",
        ) from error  # fmt: skip


def expressions_of(documents: Mapping[str, Any], place: str = "weights") -> dict[str, Expression]:
    """`expression_of` for each name."""
    return {name: expression_of(e, f"{place}: {name}") for name, e in documents.items()}
