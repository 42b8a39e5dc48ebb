"""Which modules of a layer write to the residual stream, found by what they do.

A module writes at a point of the layer (its output, or the input of one of its norms) if whatever
is added to the module's output arrives there as it is, on top of the residual that came in: o_proj
and down_proj in LLaMA, both c_proj in GPT-2, both output.dense in BERT. Names are not looked at.

Where the layer ends in a norm (BERT), everything reaches its output through a norm, which is not
linear; what such a module should write is then seen at the input of the norm that it feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.oracle.layered import STUDENT, Live

OUTPUT = ""  # the point at the end of a layer; other points are the paths of its norms
PUSH = 0.05  # of the point's own size: well above rounding, and nothing saturates
SAME = 1e-2  # of the push: how exactly it must arrive


@dataclass(frozen=True)
class Write:
    """A module of a layer that writes to the residual, and the point where that is compared."""

    module: str
    point: str


def find_writes(live: Live, number: int, hidden: Tensor, modules: frozenset[str]) -> list[Write]:
    """The writing modules of one layer among `modules`, in the order of fitting.

    `hidden` is some residual (rows, tokens, width) that enters the layer. Where everything can be
    seen at the layer's output, the module nearest to it comes first, and the others get what it
    leaves; else they come in the order of the data flow.

    Raises UnsupportedError where no module writes to the residual.
    """
    layer = live.layers[number]
    ran = _order(live, number, hidden, modules)
    with _points(layer) as points, torch.no_grad():
        output = live.layer(STUDENT, number, hidden)
        calm = {**points, OUTPUT: output}
    # what is added before a norm at the layer's end does not come out of it as it is
    ends_in_norm = any(value is output for value in _norm_outputs(live, number, hidden, output))
    writes = []
    for module in ran:
        point = _arrives(live, number, hidden, module, calm)
        if point is not None:
            writes.append(Write(module, point if ends_in_norm else OUTPUT))
    if not writes:
        raise UnsupportedError(
            f"layer {number}", "no module that writes to the residual stream",
            "a plain transformer layer", "use the strategy select or fold",
        )  # fmt: skip
    return writes if ends_in_norm else writes[::-1]


def _order(live: Live, number: int, hidden: Tensor, modules: frozenset[str]) -> list[str]:
    """The matrices of the layer whose output is as wide as the residual, as they run."""
    ran: list[str] = []
    handles = []
    for name in sorted(modules):
        module = live.layers[number].get_submodule(name)

        def note(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.shape == hidden.shape:
                ran.append(name)

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            live.layer(STUDENT, number, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def norms_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The layer's modules with a vector for a weight and no matrix: norms, by any class."""
    return {
        name: module
        for name, module in layer.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }


@contextmanager
def _points(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The inputs of the layer's norms, while it runs."""
    points: dict[str, Tensor] = {}
    handles = []
    for name, norm in norms_of(layer).items():

        def keep(_: nn.Module, args: Any, name: str = name) -> None:
            points[name] = args[0]

        handles.append(norm.register_forward_pre_hook(keep))
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _norm_outputs(live: Live, number: int, hidden: Tensor, output: Tensor) -> list[Tensor]:
    """The outputs of norms that are, value for value, the layer's own output."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, out: Tensor) -> None:
        if out.shape == output.shape and torch.equal(out, output):
            outputs.append(output)

    handles = [n.register_forward_hook(keep) for n in norms_of(live.layers[number]).values()]
    try:
        with torch.no_grad():
            live.layer(STUDENT, number, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _arrives(
    live: Live, number: int, hidden: Tensor, module: str, calm: dict[str, Tensor]
) -> str | None:
    """The first point where a push on the module's output arrives as it is, beside a residual."""
    size = calm[OUTPUT].square().mean().sqrt()
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(hidden.shape[-1], generator=generator).to(hidden) * PUSH * size
    pushed = _with(live, number, hidden, module, lambda out: out + push)
    silent = _with(live, number, hidden, module, torch.zeros_like)
    for point, value in pushed.items():
        if value.shape != hidden.shape:
            continue
        moved = value - calm[point] - push
        exact = moved.norm() <= SAME * push.norm() * (moved.numel() / push.numel()) ** 0.5
        # without the module something must be left, that is not the bare sublayer's output
        if exact and silent[point].norm() > SAME * calm[point].norm():
            return point
    return None


def _with(
    live: Live, number: int, hidden: Tensor, module: str, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """All points with the output of one module changed, in the order in which they are reached."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = live.layers[number].get_submodule(module).register_forward_hook(hook)
    try:
        with _points(live.layers[number]) as points, torch.no_grad():
            output = live.layer(STUDENT, number, hidden)
            return {**points, OUTPUT: output}
    finally:
        handle.remove()


class Watch:
    """What a layer shows while it runs: the inputs of modules, and the value at points."""

    def __init__(self, live: Live, number: int) -> None:
        self._live, self._number = live, number

    def run(self, who: str, hidden: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """(the input of the writing module, the value at its point)"""
        layer = self._live.layers[self._number]
        inputs: list[Tensor] = []
        module = layer.get_submodule(write.module)
        handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            with _points(layer) as points, torch.no_grad():
                output = self._live.layer(who, self._number, hidden)
        finally:
            handle.remove()
        return inputs[0], points.get(write.point, output)
