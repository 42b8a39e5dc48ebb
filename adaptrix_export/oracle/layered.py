"""Base and adapters in PyTorch, one layer at a time: what calibration and fidelity look at.

One model in memory is three. *Adapted*: every adapter active, as PEFT runs it. *Student*: the
adapters' deltas in the layers off, low-rank factors of our own in their place. *Base*: nothing on.
What an adapter changes outside the layers (embeddings, head) belongs to the adapted model and to
the student alike. A model that memory does not hold is run layer by layer; see `layerwise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptrix_export.arch.tasks import GENERATION, SEQUENCES
from adaptrix_export.compat.peft import tuner_layers
from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.oracle.layerwise import (
    LayerReader,
    fits,
    read_layer_by_layer,
    room_for_weights,
)
from adaptrix_export.oracle.reference import adapted_model
from adaptrix_export.plan import Base

ADAPTED, STUDENT, BASE = "adapted", "student", "base"
Pair = tuple[Tensor, Tensor]  # a (r, in) and b (out, r); the student adds b a x
CACHED_TOKENS = 4096  # in the cache of all texts that are written at once


class _StopForward(Exception):
    """Ends a forward pass whose last layer has been seen."""


class Live:
    """See the module. `layers` are the modules of the stack that is redistributed; `reader` is who
    reads them one by one, where memory does not hold the model."""

    def __init__(
        self, model: Any, prefix: str, task: str, reader: LayerReader | None = None
    ) -> None:
        self._peft = model
        self.reader = reader
        self.plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._task = task
        self._prefix = prefix
        self.layers: Sequence[nn.Module] = list(self.plain.get_submodule(prefix))
        self.device = self.plain.get_input_embeddings().weight.device
        self._tuners = [_tuner_layers(layer) for layer in self.layers]
        self._now = [ADAPTED] * len(self.layers)
        self._contexts: dict[tuple[int, ...], list[tuple[Any, Any]]] = {}
        self._factors: dict[str, Pair] = {}
        self._hooks: dict[str, Any] = {}
        for parameter in self.plain.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def open(
        cls,
        base: Base,
        adapters: Sequence[tuple[str, Path]],
        prefix: str,
        memory: int | None = None,
    ) -> Live:
        """The files of a base and of the PEFT folders (name, folder) on it, in float32; on the
        GPU when there is one. Where weights may not take `memory` bytes (by default: most of what
        is free) as a whole, layer by layer."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not fits(base, room_for_weights(memory)):
            model, reader = read_layer_by_layer(base, adapters, prefix, memory, device)
            return cls(model, prefix, base.task, reader)
        model = adapted_model(
            base.folder, base.gguf_file, base.task, tuple(adapters), base.simulated
        )
        return cls(model.to(device), prefix, base.task)

    @property
    def vocabulary(self) -> int:
        return int(self.plain.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Longest sequence, or None where the config names no limit."""
        limit = getattr(self.plain.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def width(self) -> int:
        return int(self.plain.config.get_text_config().hidden_size)

    # -- the student's factors

    def attach(self, path: str, pair: Pair) -> None:
        """The student's factors at the module `path` of the plain model, in place of any there."""
        self._factors[path] = pair
        if path not in self._hooks:
            module = self.plain.get_submodule(path)
            self._hooks[path] = module.register_forward_hook(self._adding(path))

    def detach_all(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._factors.clear()

    def _adding(self, path: str) -> Callable[..., Tensor | None]:
        layer = int(path.removeprefix(self._prefix + ".").partition(".")[0])

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if self._now[layer] != STUDENT:
                return None
            a, b = self._factors[path]
            added: Tensor = (args[0] @ a.T) @ b.T
            return output + added

        return hook

    def _use_adapters(self, who: str, layer: int) -> None:
        if self._now[layer] == who:
            return
        for tuner in self._tuners[layer]:
            tuner.enable_adapters(who == ADAPTED)
        self._now[layer] = who

    # -- running

    def enter(self, ids: Tensor, who: str = STUDENT) -> Tensor:
        """What goes into the first layer: (rows, tokens, width)."""
        first: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            first.append(hidden)
            return hidden

        with self._outside(who), self._layers_skipped(keep), torch.no_grad():
            self._forward_until_last_layer(ids)
        return first[0]

    def layer(self, who: str, number: int, hidden: Tensor) -> Tensor:
        """One layer of one of the three models on the residual that enters it, same shape out."""
        self._use_adapters(who, number)
        args, options = self._context(hidden.shape)[number]
        return _tensor(self.layers[number](hidden, *args, **options))

    def trained(self, number: int, hidden: Tensor) -> Tensor:
        """A layer of the student for gradients to flow through. Where the weights come and go, it
        is run again on the way back instead of keeping them."""
        if self.reader is None:
            return self.layer(STUDENT, number, hidden)
        output: Tensor = checkpoint(self.layer, STUDENT, number, hidden, use_reentrant=False)
        return output

    def leave(self, ids: Tensor, hidden: Tensor, who: str = STUDENT) -> Tensor:
        """From the residual after the last layer to the model's answer.

        Logits (rows, tokens, vocabulary), hidden states (rows, tokens, width) of an encoder, or
        logits (rows, 1, labels) of a classifier of sequences. Gradients flow.
        """
        with self._outside(who), self._layers_skipped(lambda _: hidden):
            out = self.plain(**self._fed(ids))
        return self._answer(out)

    @contextmanager
    def _outside(self, who: str) -> Iterator[None]:
        """What adapters change outside of the layers: off for the base, on for the others."""
        if who != BASE:
            yield
            return
        for number in range(len(self.layers)):
            self._use_adapters(ADAPTED, number)  # PEFT turns on again only what was on
        self._now = [BASE] * len(self.layers)
        try:
            with self._peft.disable_adapter():
                yield
        finally:
            self._now = [ADAPTED] * len(self.layers)

    def base_answer(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The base's own answer, everything that any adapter changes off, as `leave` gives it;
        and its residual after each layer."""
        residuals: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            residuals.append(_tensor(output))

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            with self._outside(BASE), torch.no_grad():
                out = self.plain(**self._fed(ids))
        finally:
            for handle in handles:
                handle.remove()
        return self._answer(out), residuals

    def _answer(self, out: Any) -> Tensor:
        answer: Tensor = out.logits if "logits" in out else out.last_hidden_state
        return answer[:, None] if self._task == SEQUENCES else answer

    def generate(self, rows: int, length: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """`rows` texts of `length` tokens that the adapted model draws, from its start token on."""
        for number in range(len(self.layers)):
            self._use_adapters(ADAPTED, number)
        generator = torch.Generator().manual_seed(seed)
        batch = max(1, CACHED_TOKENS // length)
        drawn = [
            self._drawn(min(batch, rows - start), length, generator)
            for start in range(0, rows, batch)
        ]
        return torch.cat(drawn).cpu().numpy()

    def _drawn(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        config = self.plain.config.get_text_config()
        start = next((t for t in (config.bos_token_id, config.eos_token_id) if t is not None), 0)
        start = start[0] if isinstance(start, list) else start
        ids = torch.full((rows, 1), int(start), device=self.device)
        drawn, cache, fed = ids, None, ids
        with torch.no_grad():
            for _ in range(length - 1):
                out = self.plain(input_ids=fed, **cache_argument(cache), use_cache=True)
                cache = cache_of(out)
                chances = out.logits[:, -1].float().softmax(-1).cpu()
                fed = torch.multinomial(chances, 1, generator=generator).to(self.device)
                drawn = torch.cat([drawn, fed], dim=1)
        return drawn

    def _fed(self, ids: Tensor) -> dict[str, Any]:
        fed: dict[str, Any] = {"input_ids": ids}
        if self._task == GENERATION:
            fed["use_cache"] = False
        else:
            fed["attention_mask"] = torch.ones_like(ids)
        return fed

    def _context(self, shape: torch.Size) -> list[tuple[Any, Any]]:
        """What each layer is called with beside the residual: masks, rotations, positions.

        They depend on the number of rows and tokens alone: there is no padding.
        """
        key = tuple(shape[:2])
        if key not in self._contexts:
            self._contexts.clear()  # one shape at a time: masks are tokens times tokens
            ids = torch.zeros(key, dtype=torch.long, device=self.device)
            with self._layers_skipped(lambda hidden: hidden) as called, torch.no_grad():
                self._forward_until_last_layer(ids)
            self._contexts[key] = [called[n] for n in range(len(self.layers))]
        return self._contexts[key]

    def _forward_until_last_layer(self, ids: Tensor) -> None:
        last = self.layers[-1].register_forward_hook(_stop)
        try:
            self.plain(**self._fed(ids))
        except _StopForward:
            return
        finally:
            last.remove()
        raise UnsupportedError(
            self._prefix, "layers that the model does not call one by one", "a plain stack"
        )

    @contextmanager
    def _layers_skipped(
        self, first: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[int, tuple[Any, Any]]]:
        """The layers pass the residual on as it is, the first one what `first` makes of it."""
        called: dict[int, tuple[Any, Any]] = {}
        before: dict[int, Any] = {}
        for number, layer in enumerate(self.layers):
            before[number] = layer.__dict__.get("forward")
            layer.forward = _skipping(called, number, first if number == 0 else None)
        try:
            yield called
        finally:
            for number, layer in enumerate(self.layers):
                if before[number] is None:
                    del layer.forward
                else:  # one that brings the weights: see `layerwise.py`
                    layer.forward = before[number]


def _skipping(
    called: dict[int, tuple[Any, Any]], number: int, first: Callable[[Tensor], Tensor] | None
) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        called[number] = (args, options)
        return first(hidden_states) if first else hidden_states

    return forward


def _stop(*_: Any) -> None:
    raise _StopForward


def _tensor(output: Any) -> Tensor:
    """The residual, which some layers give as the first of several things."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _tuner_layers(layer: nn.Module) -> list[Any]:
    return [module for _, module in tuner_layers(layer)]


class States:
    """The residual of every row at one depth, (rows, tokens, width), in a file: memory holds only
    the rows that are worked on."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int]) -> None:
        self._path, self._row = folder / name, shape[1:]
        with self._path.open("wb") as file:
            file.truncate(4 * prod(shape))

    def read(self, start: int, stop: int, device: Any) -> Tensor:
        size = prod(self._row)
        values = np.fromfile(self._path, np.float32, (stop - start) * size, offset=4 * start * size)
        return torch.from_numpy(values.reshape(stop - start, *self._row)).to(device)

    def write(self, start: int, hidden: Tensor) -> None:
        with self._path.open("r+b") as file:
            file.seek(4 * start * prod(self._row))
            hidden.float().cpu().contiguous().numpy().tofile(file)


def factors_of(pairs: Mapping[str, Any], device: Any) -> dict[str, Pair]:
    """numpy pairs as torch pairs on a device."""
    return {p: (_put(a, device), _put(b, device)) for p, (a, b) in pairs.items()}


def _put(values: Any, device: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
