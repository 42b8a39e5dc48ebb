"""Run a PEFT layer in float64, from its forward pass to the casts inside its formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoFloat32(TorchFunctionMode):
    """Whatever asks for float32 gets float64: C3A, DEFT, FourierFT and others cast to float32.

    Those casts spare 16-bit weights; here they would only throw bits away, differently in the
    merge and in the forward pass.
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
        args = tuple(_widened(a) for a in args)
        return func(*args, **{k: _widened(v) for k, v in (kwargs or {}).items()})


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def in_double(tensors: Iterable[Any]) -> Iterator[None]:
    """`tensors` hold their values in float64 (exact), and as they were again afterwards."""
    own = [t for t in {id(t): t for t in tensors}.values() if t.is_floating_point()]
    kept, default = [t.data for t in own], torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # for what a formula makes anew, as torch.zeros does
        for tensor in own:
            tensor.data = tensor.data.double()
        with _NoFloat32(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)
        for tensor, values in zip(own, kept, strict=True):
            tensor.data = values


def tensors_of(module: Any) -> list[Any]:
    """Parameters and buffers of a module, those of modules inside it too."""
    return [*module.parameters(), *module.buffers()]
