"""Run a PEFT layer in float64, including the casts to float32 inside its formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoFloat32(TorchFunctionMode):
    """Replaces casts to float32 by casts to float64: C3A, DEFT, FourierFT and others cast.

    The casts are meant for 16-bit weights; here they would lose precision, and in other places in
    the merge than in the forward pass.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(_to_float64(a) for a in args)
        return func(*args, **{k: _to_float64(v) for k, v in (kwargs or {}).items()})


def _to_float64(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def in_double(tensors: Iterable[Any]) -> Iterator[None]:
    """Convert `tensors` to float64 within the context (exact), and restore them afterwards."""
    own = [t for t in {id(t): t for t in tensors}.values() if t.is_floating_point()]
    originals, default = [t.data for t in own], torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # for tensors that a formula creates (torch.zeros)
        for tensor in own:
            tensor.data = tensor.data.double()
        with _NoFloat32(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)
        for tensor, values in zip(own, originals, strict=True):
            tensor.data = values


def tensors_of(module: Any) -> list[Any]:
    """Parameters and buffers of a module and its submodules."""
    return [*module.parameters(), *module.buffers()]
