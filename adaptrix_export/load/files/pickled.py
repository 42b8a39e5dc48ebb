"""Interprets a pickle written by `torch.save` without unpickling it.

A pickle is a program, and even torch's `weights_only` unpickler has had two known exploits. The few
opcodes and functions that `torch.save` uses for tensors in dicts are interpreted here over plain
values; every other one is refused by name. Nothing is imported, no class is looked up, and no code
of the file runs.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptrix_export.errors import SourceError, UnsupportedError

MAX_PICKLE = 4 << 20  # bytes; a tensor takes about 200
MAX_STEPS = 600_000  # instructions; a tensor takes about 25
MAX_DIMS = 8
STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class Global:
    """A global that the pickle refers to, as `module name`."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A torch storage: the archive member that contains it, and its declared number of values."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; `offset` and `strides` count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Machine:
    """Stack, marks and memo. A malformed program raises one of `_NONSENSE`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self, count: int) -> list[Any]:
        """Remove and return the last `count` values; none from below the last mark."""
        floor = self.marks[-1] if self.marks else 0
        if count > len(self.stack) - floor:
            raise IndexError("a value is missing")
        return self._above(len(self.stack) - count)

    def marked(self) -> list[Any]:
        """Remove and return all values above the last mark, and remove the mark."""
        return self._above(self.marks.pop())

    def _above(self, at: int) -> list[Any]:
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"no {kind.__name__} to put values into")
        return self.stack[-1]

    def set_items(self, flat: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, (str, int)):  # hashing a deep tuple would overflow the C stack
                raise ValueError(f"a key of type {type(key).__name__}")
            if key in target:
                raise ValueError(f"duplicate key {str(key)[:80]!r}")
            target[key] = value


_NONSENSE = (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


def _storage(machine: _Machine) -> Storage:
    """`("storage", torch.FloatStorage, key, location, count)`."""
    ((kind, storage_type, key, _, count),) = machine.pop(1)
    if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a storage of an unknown form")
    return Storage(key, STORAGES[storage_type.name], count)


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """`_rebuild_tensor_v2(storage, offset, size, stride, ...)`."""
    storage, offset, shape, strides = arguments[:4]
    # Lengths first: iterating over a long tuple that is referenced a million times would not end.
    if not isinstance(storage, Storage) or not len(shape) == len(strides) <= MAX_DIMS:
        raise ValueError("a tensor of an unknown form")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError("a tensor with a negative or huge size")
    return PickledTensor(storage, offset, tuple(shape), tuple(strides))


def _no_arguments(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict with arguments")
    return {}


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda arguments: arguments[0],
    "collections OrderedDict": _no_arguments,
}


def _reduce(machine: _Machine) -> Any:
    function, arguments = machine.pop(2)
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise ValueError("a call of something that is no function")
    return _CALLS[function.name](arguments)


def _build(machine: _Machine) -> None:
    """Discard a state dict's `_metadata`, which has no tensor values."""
    machine.pop(1)
    machine.top(dict)


Step = Callable[[_Machine, Any], None]


def _constant(make: Callable[[], Any]) -> Step:
    return lambda machine, _: machine.stack.append(make())


def _argument(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _remember(machine: _Machine, index: Any) -> None:
    machine.memo[index] = machine.stack[-1]


def _recall(machine: _Machine, index: Any) -> None:
    machine.stack.append(machine.memo[index])


def _tuple(count: int) -> Step:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


_STEPS: dict[str, Step] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _argument),
    "GLOBAL": lambda machine, name: machine.stack.append(Global(name)),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.marked())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(machine)),
    "REDUCE": lambda machine, _: machine.stack.append(_reduce(machine)),
    "BUILD": lambda machine, _: _build(machine),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "APPEND": lambda machine, _: _append(machine, machine.pop(1)),
    "APPENDS": lambda machine, _: _append(machine, machine.marked()),
}


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


def describe_pickle(data: bytes, place: str) -> Any:
    """The value that `data` describes, tensors as `PickledTensor`.

    Raises UnsupportedError for an opcode or global that tensors in dicts do not need, SourceError
    for a malformed program or one longer than MAX_PICKLE or MAX_STEPS.
    """
    if len(data) > MAX_PICKLE:
        raise SourceError(place, f"a pickle of {len(data)} bytes", f"at most {MAX_PICKLE}")
    machine = _Machine()
    try:
        for step, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if step == MAX_STEPS:
                raise SourceError(
                    place, f"a pickle of more than {step} instructions", f"at most {MAX_STEPS}"
                )
            if operation.name not in _STEPS:
                raise _refused(place, f"a pickle with the instruction {operation.name}")
            if operation.name == "GLOBAL" and argument not in (*STORAGES, *_CALLS):
                name = str(argument).replace(" ", ".")
                raise _refused(place, f"a pickle that asks for {name[:80]!r}")
            _STEPS[operation.name](machine, argument)
        (value,) = machine.stack
    except _NONSENSE as error:
        raise SourceError(
            place, f"a damaged pickle ({error})", "a file by torch.save", "save it again"
        ) from error
    return value


def _refused(place: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        place, found, "tensors and numbers in dicts, as torch.save writes them",
        "it may run code; save the adapter as safetensors",
    )  # fmt: skip
