"""Merges with PEFT's own layers, one module at a time, on a model without weights.

The skeleton is the real module tree whose weights are one stored zero, expanded by strides, so that
PEFT wraps it like the model (on meta tensors PEFT silently drops the adapter). A module has its
real values only while its layer merges them. Memory is that of the adapter and one module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open

from adaptrix_export.compat.peft import tuner_layers
from adaptrix_export.compat.torch import buffers_of, parameters_of
from adaptrix_export.compat.transformers import model_from_config
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load.adapters.tuned_adapter import (
    WEIGHTS,
    SortedTensors,
    module_paths,
    tuner_keys,
)
from adaptrix_export.load.adapters.tuners import TUNERS, Tuner
from adaptrix_export.merge.in_double import in_double, tensors_of
from adaptrix_export.plan import Array, Base, Tuned

# What PEFT raises for a config or a module that it cannot use.
_REFUSALS = (
    ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, ImportError, AttributeError,
)  # fmt: skip
# Wrapped modules of their own, which the plan replaces whole; PEFT would copy them in memory.
_WHOLE = {"modules_to_save": None, "trainable_token_indices": None, "task_type": None}


@dataclass(frozen=True)
class Skeleton:
    """A PEFT `model` with the adapter's weights and without the base's; tuner layers by path."""

    model: Any
    layers: Mapping[str, Any]
    place: str

    @classmethod
    def build(cls, term: Tuned) -> Skeleton:
        """The skeleton for the adapter of `term`.

        Raises UnsupportedError for what PEFT refuses, AdapterError for a tensor that PEFT does not
        use, for a module that it adapts without a tensor, and for a module that it does not adapt.
        """
        place = term.folder.name
        config, tensors = tuner_keys(term.folder)
        tuner = TUNERS[term.kind]
        expected = set(module_paths(place, config, tuner, tensors, term.base))
        model = empty_model(term.base, expected)
        with _peft_refusals(place, term.kind), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random values are overwritten, or refused below
            wrapped, missing = _wrap(model, term.folder, tensors)
        _check_all_set(place, wrapped, missing, tuner)
        layers = dict(tuner_layers(wrapped.get_base_model()))
        saved = tuple(config.get("modules_to_save") or ())
        for path in sorted(expected ^ set(layers)):
            if path in expected:
                raise AdapterError(
                    f"{place}: {path}", "PEFT does not adapt this module by the config",
                    "the modules that the file has tensors for", "save the adapter again",
                )  # fmt: skip
            if not path.endswith(saved or ("\0",)):
                raise AdapterError(
                    f"{place}: {path}", "a module that the config targets and the file lacks",
                    "a tensor for every targeted module", "save the adapter again",
                )  # fmt: skip
        return cls(wrapped, {path: layers[path] for path in expected}, place)

    def merge(self, path: str, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """The merged float64 parameters of one module, in the base's layout."""
        layer = self.layers[path]
        before = dict(vars(layer))
        module = layer.get_base_layer()
        empty = {id(t) for t in tensors_of(module)}
        own = [t for t in tensors_of(layer) if id(t) not in empty]
        with _peft_refusals(self.place, path), in_double(own), _with_values(module, parameters):
            layer.merged_adapters = []
            layer.merge()
            merged = {name: getattr(module, name).detach().numpy().copy() for name in parameters}
        vars(layer).clear()
        vars(layer).update(before)  # forgets the merge, and any copy of the weight kept for undoing
        for name, value in merged.items():
            if value.shape != parameters[name].shape:
                raise UnsupportedError(
                    f"{self.place}: {path}.{name}", f"merged shape {value.shape}",
                    f"{parameters[name].shape}", "this module kind cannot be merged",
                )  # fmt: skip
        return merged


@contextmanager
def _peft_refusals(place: str, what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is checked and is an error here
            yield
    except _REFUSALS as error:
        raise UnsupportedError(
            f"{place}: {what}", f"PEFT cannot build it ({error})", "a layer that merges",
            "merge with PEFT, or retrain on modules that it supports",
        ) from error  # fmt: skip


def empty_model(base: Base, paths: set[str]) -> Any:
    """The module tree of `base` in float32, its weights without storage of their own.

    The class is the one that config.json names, or the causal language model: the first that has
    the modules `paths`.
    """
    config = transformers.AutoConfig.for_model(**base.config)
    for name in [*(base.config.get("architectures") or []), "AutoModelForCausalLM"]:
        cls: Any = getattr(transformers, str(name), None)
        if cls is None:
            continue
        with torch.device("meta"):
            make = cls.from_config if name.startswith("Auto") else partial(model_from_config, cls)
            model = make(config, dtype=torch.float32)  # as the oracle loads it, not as config says
        if paths <= {path for path, _ in model.named_modules()}:
            _make_real(model)
            return model.eval()
    raise AdapterError(
        base.spec, f"a model without {min(paths)}", "every module that the adapter changes",
        "was this adapter trained on another model?",
    )  # fmt: skip


def _make_real(model: Any) -> None:
    """Replace every meta tensor by an expanded zero; shared tensors stay shared."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for values in (parameters_of(module), buffers_of(module)):
            for name, old in values.items():
                if old is None or old.device.type != "meta":
                    continue
                if id(old) not in replaced:
                    zeros = torch.zeros(1, dtype=old.dtype).expand(old.shape)
                    is_parameter = isinstance(old, torch.nn.Parameter)
                    replaced[id(old)] = (
                        torch.nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
                    )
                values[name] = replaced[id(old)]


def _wrap(model: Any, folder: Path, tensors_by_module: SortedTensors) -> tuple[Any, set[str]]:
    """(`model` wrapped by PEFT with the adapter's tensors, the keys that the file lacks)."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = ""  # else PEFT asks the hub about the model of that name
    config.inference_mode = True
    for name, value in _WHOLE.items():
        if hasattr(config, name):
            setattr(config, name, value)
    wrapped = peft.PeftModel(model, config)
    tensors = [t for parts in tensors_by_module.parts.values() for t in parts.values()]
    names = {t.name for t in (*tensors, *tensors_by_module.shared)}
    with safe_open(folder / WEIGHTS, "pt") as file:
        state = {name: file.get_tensor(name) for name in names}
    result: Any = set_peft_model_state_dict(wrapped, state)
    if result.unexpected_keys:
        raise AdapterError(
            f"{folder.name}: {min(result.unexpected_keys)}", "a tensor that PEFT does not place",
            "every tensor in the model", "save the adapter again",
        )  # fmt: skip
    return wrapped.eval(), set(result.missing_keys)


def _check_all_set(place: str, wrapped: Any, missing: set[str], tuner: Tuner) -> None:
    """Refuse an adapter whose layers keep a tensor as PEFT initialised it.

    Tensors that layers share (VeRA's projections) have a name in each, and are set once.
    """
    state = wrapped.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in state.items() if key not in missing}
    layers = [path for path, _ in tuner_layers(wrapped)]
    inside = tuple(f"{name}." for name in layers)
    known = [f"{name}.{part}." for name in layers for part in ("base_layer", *tuner.computed)]
    for key in sorted(missing):
        own = key.startswith(inside or ("\0",)) and not key.startswith(tuple(known))
        if own and id(state[key]) not in loaded:
            raise AdapterError(
                f"{place}: {key}", "a tensor that the file lacks and PEFT would invent",
                "every tensor of every targeted module", "save the adapter again",
            )  # fmt: skip


@contextmanager
def _with_values(module: Any, parameters: Mapping[str, Array]) -> Iterator[None]:
    """Set the parameters of `module` to real values within the context."""
    empty = {name: getattr(module, name) for name in parameters}
    for name, value in parameters.items():
        real = torch.from_numpy(np.ascontiguousarray(value))
        setattr(module, name, torch.nn.Parameter(real.clone(), requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in empty.items():
            setattr(module, name, parameter)
