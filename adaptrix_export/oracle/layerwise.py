"""A model that memory does not hold: the weights of its layers are read when a layer runs.

The model is built without weights. What lies outside of the layers (embeddings, the last norm, a
head) is read at once; in the layers stand zeros of stride 0, which have every shape and no size,
until a layer runs. Its weights are then read from the base's files, whatever their format, and stay
as long as there is room. The layers that were read first stay longest: whoever runs a whole model
again and again meets those first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from adaptrix_export.arch.tasks import CLASSIFIERS, FEATURES, LABELS, TASKS
from adaptrix_export.compat.torch import buffers_of, parameters_of
from adaptrix_export.errors import MachineError, RecipeError, UnsupportedError
from adaptrix_export.graph.frontends.live_config import live_config
from adaptrix_export.oracle.reference import resize_vocabulary, shipped_whole, with_adapters
from adaptrix_export.plan import Base, Plan, Tensor

FLOAT = 4  # bytes of a weight as it runs
SHARE = 0.7  # of the free memory that weights may take; the rest is for what is computed
Adapters = Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class _Weight:
    """A parameter of a layer, and where its values are."""

    module: nn.Module
    name: str  # of the parameter in the module
    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return FLOAT * prod(self.tensor.shape)

    def fill(self, device: Any) -> None:
        parameters_of(self.module)[self.name] = _parameter(_values(self.tensor, device))

    def empty(self, device: Any) -> None:
        parameters_of(self.module)[self.name] = _parameter(_stand_in(self.tensor.shape, device))


class LayerReader:
    """Reads the weights of a stack's layers as they run, and forgets them to stay within `room`.

    `most` is the largest number of bytes that it held at once, `reads` the layers that it read.
    Weights are put in place of one another as parameters, never as the data of one: what autograd
    has kept for its way back stays as it was.
    """

    def __init__(self, weights: Sequence[Sequence[_Weight]], room: int, device: Any) -> None:
        self._weights, self.room, self._device = weights, room, device
        self._sizes = [sum(w.nbytes for w in own) for own in weights]
        self._here: list[int] = []
        self.reads = self.most = 0

    def bring(self, number: int) -> None:
        """Have the weights of a layer in place."""
        if number in self._here:
            return
        while self._here and self._held() + self._sizes[number] > self.room:
            for weight in self._weights[self._here.pop()]:
                weight.empty(self._device)
        for weight in self._weights[number]:
            weight.fill(self._device)
        self._here.append(number)
        self.reads += 1
        self.most = max(self.most, self._held())

    def _held(self) -> int:
        return sum(self._sizes[number] for number in self._here)

    def attend(self, layers: Sequence[nn.Module]) -> None:
        """From now on each layer is brought before it runs."""
        for number, layer in enumerate(layers):
            layer.forward = self._bringing(number, layer.forward)

    def _bringing(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.bring(number)
            return forward(*args, **options)

        return run


def room_for_weights(memory: int | None) -> int:
    """Bytes that weights may take: as asked for, or a share of what the machine has free."""
    if memory is not None:
        return memory
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    return int(SHARE * min(size for device, size in free.items() if device in ("cpu", 0)))


def fits(base: Base, room: int) -> bool:
    """Whether the whole base fits, in float32."""
    return sum(FLOAT * prod(t.shape) for t in base.tensors.values()) <= room


def read_layer_by_layer(
    base: Base, adapters: Adapters, prefix: str, memory: int | None, device: Any
) -> tuple[Any, LayerReader]:
    """The adapted model of a base, whose layers under `prefix` are read as they run.

    Raises UnsupportedError for a model that has parameters of other names than its files,
    RecipeError or MachineError for room that does not hold the largest layer beside the rest.
    """
    model = _weightless(base, adapters)
    layers = list(model.get_submodule(prefix))
    weights = [_weights(base, f"{prefix}.{number}", layer) for number, layer in enumerate(layers)]
    room = _room_for_layers(base, prefix, weights, memory)
    for own in weights:
        for weight in own:
            weight.empty(device)
    shipped = shipped_whole(tuple(adapters))
    _fill_rest(base, model, shipped, device)
    resize_vocabulary(model, shipped)
    model = with_adapters(model.eval(), tuple(adapters)) if adapters else model.eval()
    plain = model.get_base_model() if adapters else model
    if len(plain.get_submodule(prefix)) != len(layers):
        raise UnsupportedError(
            base.spec, "an adapter that repeats layers, and too little memory for the model",
            "one of the two", "use a machine with more memory",
        )  # fmt: skip
    reader = LayerReader(weights, room, device)
    reader.attend(layers)
    return model, reader


def _weightless(base: Base, adapters: Adapters) -> Any:
    """The model of a base with buffers alone."""
    from accelerate import init_empty_weights

    config = live_config(Plan(base, ()))
    shipped = shipped_whole(tuple(adapters))
    heads = [shipped[name] for name in LABELS if name in shipped]
    if base.task in CLASSIFIERS and heads:
        config.num_labels = heads[0][0]
    auto: Any = getattr(transformers, TASKS[base.task].auto)
    with init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _weights(base: Base, path: str, layer: nn.Module) -> list[_Weight]:
    """Every parameter of a layer with its tensor."""
    weights = []
    for name, parameter in layer.named_parameters():
        tensor = base.tensors.get(f"{path}.{name}")
        if tensor is None or tuple(tensor.shape) != tuple(parameter.shape):
            raise _unnamed(base, f"{path}.{name}")
        home, _, own = name.rpartition(".")
        weights.append(_Weight(layer.get_submodule(home), own, tensor))
    return weights


def _room_for_layers(
    base: Base, prefix: str, weights: Sequence[Sequence[_Weight]], memory: int | None
) -> int:
    rest = sum(
        FLOAT * prod(t.shape)
        for name, t in base.tensors.items()
        if not name.startswith(f"{prefix}.")
    )
    least = rest + max(sum(w.nbytes for w in own) for own in weights)
    room = room_for_weights(memory)
    if room >= least:
        return room - rest
    available, expected = f"{room} bytes for weights", f"at least {least}"
    if memory is not None:
        raise RecipeError(
            "max_memory", available, expected, "one layer and the embeddings take that"
        )
    raise MachineError(base.spec, available, expected, "free some memory, or use a larger machine")


def _fill_rest(
    base: Base, model: nn.Module, shipped: Mapping[str, tuple[int, ...]], device: Any
) -> None:
    """Read what is on no layer, and put every buffer on the device."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        for name, buffer in buffers_of(module).items():
            if buffer is not None:
                stored = base.tensors.get(start + name)
                buffers_of(module)[name] = (
                    buffer.to(device) if stored is None else _values(stored, device).to(buffer)
                )
        for name, parameter in parameters_of(module).items():
            if parameter is not None and parameter.is_meta:
                values = _rest(base, start + name, parameter, shipped, device)
                parameters_of(module)[name] = _parameter(values)
    for name, home in base.tied.items():
        if name not in base.tensors:
            at, _, own = name.rpartition(".")
            parameters_of(model.get_submodule(at))[own] = model.get_parameter(home)


def _rest(
    base: Base, name: str, parameter: Any, shipped: Mapping[str, tuple[int, ...]], device: Any
) -> torch.Tensor:
    if name in base.tensors:
        return _values(base.tensors[name], device)
    # in the files there is none of what shares another's, of a head that an adapter ships whole,
    # and of a pooler that is not looked at
    if (
        name in base.tied
        or name in shipped
        or (base.task == FEATURES and name.startswith("pooler."))
    ):
        return _stand_in(tuple(parameter.shape), device)
    raise _unnamed(base, name)


def _values(tensor: Tensor, device: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(tensor.read(), dtype=np.float32)).to(device)


def _stand_in(shape: tuple[int, ...], device: Any) -> torch.Tensor:
    return torch.zeros(1, device=device).expand(shape)


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _unnamed(base: Base, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{base.spec}: {name}", "no tensor of that name and shape in the files",
        "one for each parameter of a model that is read layer by layer",
        "use a machine with memory for the whole model",
    )  # fmt: skip
