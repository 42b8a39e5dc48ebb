"""The oracle of a quantized artifact: the plain model with the very values that are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import Concat, Expression, TensorRef
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.reference import Reference, bare_model, with_adapters

Values = NDArray[np.float32]


def dequantized(
    job: Job,
    stored: Iterable[tuple[Expression, Values]],
    others: Mapping[str, Values],
    adapters: tuple[tuple[str, Any], ...] = (),
) -> Reference:
    """The model of `job` with `stored` values where their expressions say that they come from,
    and with `others` by parameter name; `adapters` act on it, in float.

    Tensors that share their values go on doing so, unless both ends are given.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model = bare_model(job.base_folder, job.gguf_file, job.task, job.adapters, job.simulated)
    written: set[str] = set()
    for expression, values in stored:
        _put(model, expression, values, written)
    for name, values in others.items():
        _put(model, TensorRef(name), values, written)
    return Reference((with_adapters(model, adapters) if adapters else model).eval())


def _put(model: Any, expression: Expression, values: Values, written: set[str]) -> None:
    """Write values into the parameters that an expression reads."""
    if isinstance(expression, Concat):
        start, axis = 0, expression.axis
        for part in expression.of:
            size = part.evaluate(lambda name: _array(model, name)).shape[axis]
            cut = (slice(None),) * axis + (slice(start, start + size),)
            _put(model, part, values[cut], written)
            start += size
        return
    for name in expression.names():
        _own(model, name, written)
    target = expression.evaluate(lambda name: _array(model, name))
    home = next(expression.names())
    if not np.shares_memory(target, _array(model, home)) or target.shape != values.shape:
        raise ParityError(
            home, f"stored values {values.shape} that no part of it can take", f"{target.shape}"
        )
    target[...] = values


def _array(model: Any, name: str) -> Values:
    values: Values = model.get_parameter(name).data.numpy()
    return values


def _own(model: Any, name: str, written: set[str]) -> None:
    """A parameter that shares its values with one that was given has its own from here on."""
    if name in written:
        return
    parameter = model.get_parameter(name)
    sharing = {n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter}
    if sharing & written:
        path, _, attribute = name.rpartition(".")
        made = torch.nn.Parameter(parameter.data.clone(), requires_grad=False)
        setattr(model.get_submodule(path), attribute, made)
    written.add(name)
