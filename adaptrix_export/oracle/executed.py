"""The oracle for a composed plan: PyTorch executing the plan.

Every adapter is loaded by stock PEFT, alone, on a copy of the base that shares its parameters; what
its live layer adds is taken in fp64, composed by `oracle/composed.py`, and put into the base model
in place of the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.composed import Made, Share, compose
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.live import live_delta, live_factors, live_parameter
from adaptrix_export.oracle.reference import (
    Reference,
    bare_model,
    shipped_whole,
    with_adapters,
)

TURNED = ("Conv1D", "Embedding")  # layers that store a weight (in, out)


class Executed(Reference):
    """Base and adapters, composed as `job.composition` says."""

    def __init__(self, job: Job, base: Any, alone: dict[str, Any]) -> None:
        self._job, self._base, self._alone = job, base, alone
        self._room: dict[str, float] = {}
        model = sharing(base, set())
        for name in _parameters(base):
            value, changed = self._composed(name)
            if changed:
                put_parameter(model, name, value.float())
        super().__init__(model)

    @classmethod
    def open(cls, job: Job) -> Reference:
        """Loads the files that `job` names; each adapter is proved to have arrived."""
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        base = bare_model(job.base_folder, job.gguf_file, job.task, job.adapters, job.simulated)
        folders: dict[str, list[tuple[str, Path]]] = {}
        for name, folder in job.adapters:  # an adapter that was cut up has several
            folders.setdefault(name, []).append((name, folder))
        alone = {
            name: on_a_copy(base, tuple(own)).get_base_model() for name, own in folders.items()
        }
        return cls(job, base, alone)

    def live(self, name: str, widen: bool = True) -> tuple[NDArray[Any], bool]:
        value, changed = self._composed(name)
        return value.numpy(), changed

    def room(self, name: str) -> float:
        return self._room.get(name, 0.0)

    def close(self) -> None:
        self._base, self._alone = None, {}
        super().close()

    def _composed(self, name: str) -> tuple[Any, bool]:
        """The parameter `name` with the composed delta, in fp64, and whether it is changed."""
        base = live_parameter(self._base, name)[0]
        start, replaced, shares = base, False, []
        turned, stacked = False, False
        for adapter, model in self._alone.items():
            delta, layer = live_delta(model, name, base)
            if delta is None:
                value = live_parameter(model, name)[0]
                if value.shape != base.shape or not torch.equal(value, base):
                    start, replaced = value, True
                continue
            turned = name.endswith(".weight") and (type(layer.get_base_layer()).__name__ in TURNED)
            stacked = type(layer).__name__ == "ParamWrapper" and delta.dim() == 3
            factors = live_factors(layer) if name.endswith(".weight") else None
            shares.append(Share(adapter, self._weight(adapter, name), delta, factors))
        if not shares:
            return start, replaced
        made = self._made(shares, name, turned, stacked)
        self._room[name] = made.room
        return start + made.delta, True

    def _made(self, shares: list[Share], name: str, turned: bool, stacked: bool) -> Made:
        options = self._job.composition
        assert options is not None
        several = len(self._alone) > 1
        shape = shares[0].delta.shape
        if stacked:
            experts = [
                [Share(s.adapter, s.weight, s.delta[e]) for s in shares] for e in range(shape[0])
            ]
            made = [
                compose(own, options, f"{name}[{e}]", False, several)
                for e, own in enumerate(experts)
            ]
            return Made(torch.stack([m.delta for m in made]), max(m.room for m in made))
        flat = [Share(s.adapter, s.weight, _flat(s.delta, turned), s.factors) for s in shares]
        one = compose(flat, options, name, turned, several)
        if isinstance(one.delta, float):
            return Made(torch.zeros(shape, dtype=torch.float64))
        return Made((one.delta.T if turned else one.delta).reshape(shape), one.room)

    def _weight(self, adapter: str, name: str) -> float:
        """The adapter's weight at the layer that is the first number in the name."""
        assert self._job.composition is not None
        weights = self._job.composition["weights"].get(adapter)
        if weights is None:
            return 1.0
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        return float(weights["layers"].get(layer, weights["default"]))


def _flat(delta: Any, turned: bool) -> Any:
    """(out, in): a kernel flattened, a bias as a column."""
    delta = delta.reshape(delta.shape[0], -1)
    return delta.T if turned else delta


def sharing(model: Any, apart: set[str]) -> Any:
    """A copy of a model's modules that holds the same parameters, but for those named `apart`.

    PEFT writes what an adapter ships whole (biases, resized embeddings) into the base's own.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    written = {id(tensor) for name, tensor in tensors if name in apart}
    shared = {id(tensor): tensor for _, tensor in tensors if id(tensor) not in written}
    return copy.deepcopy(model, shared)


def on_a_copy(base: Any, adapters: tuple[tuple[str, Path], ...]) -> Any:
    """The PEFT model of a base and adapters (name, folder), which shares the base's parameters and
    leaves the base as it is."""
    return with_adapters(sharing(base, set(shipped_whole(adapters))), adapters).eval()


def _parameters(model: Any) -> Iterator[str]:
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name


def put_parameter(model: Any, name: str, value: Any) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if getattr(module, attribute).shape != value.shape:
        raise ParityError(name, f"a composed shape {tuple(value.shape)}", "the base's")
    setattr(module, attribute, torch.nn.Parameter(value, requires_grad=False))
