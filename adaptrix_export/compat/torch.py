"""What PyTorch does not offer by a public name."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

Tensors = MutableMapping[str, Any]
# Operators that torch.export and `__torch_dispatch__` show for plain views, copies and casts. Seen
# in torch 2.11 to 2.13. Without them the native front end refuses what reshapes or casts a weight.
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
RESHAPE_ALIAS = torch.ops.aten._reshape_alias.default
TO_COPY = torch.ops.aten._to_copy.default


def parameters_of(module: torch.nn.Module) -> Tensors:
    """A module's own parameters by name, to be replaced in place.

    Seen in torch 2.11 to 2.13. Without it a parameter that a module holds under two names is
    listed under one, and keeps its old values under the other.
    """
    return module._parameters


def buffers_of(module: torch.nn.Module) -> Tensors:
    """A module's own buffers by name, to be replaced in place.

    Seen in torch 2.11 to 2.13. Without it a buffer that a trace registered stays in the model.
    """
    return module._buffers


def fake_mode() -> Any:
    """A mode whose tensors have a shape and no storage, beside real ones.

    Seen in torch 2.11 to 2.13. Without it a model must be in memory to be traced.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_parameter(mode: Any, parameter: torch.Tensor) -> torch.nn.Parameter:
    """A fake parameter on the CPU, of the shape and dtype of `parameter`.

    Seen in torch 2.11 to 2.13. Without it fake parameters are of the meta device, and the model's
    real buffers of the CPU.
    """
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    fake = mode.fake_tensor_converter.from_meta_and_device(mode, empty, torch.device("cpu"))
    return torch.nn.Parameter(fake, requires_grad=False)


def without_storage(cls: type[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """An instance of a subclass of Tensor that has a shape, float32, and no values.

    Seen in torch 2.11 to 2.13. Without it what a front end does to weights could be recorded only
    with the weights in memory.
    """
    made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        cls, torch.Size(shape), dtype=torch.float32
    )
    return made


@contextmanager
def counted_buckets() -> Iterator[None]:
    """`torch.bucketize`, which has no translation to ONNX, as a count of the boundaries passed.

    Seen in torch 2.13. Without it the vision encoder of Idefics3 and SmolVLM is not exported.
    """

    def bucketize(values: Any, boundaries: Any, *, right: bool = False) -> Any:
        passed = boundaries <= values[..., None] if right else boundaries < values[..., None]
        return passed.sum(-1)

    with patch.object(torch, "bucketize", bucketize):
        yield
