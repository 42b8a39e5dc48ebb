"""A transformers model whose parameters have no storage, for tracing."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptrix_export.arch.tasks import TASKS


def weightless(config: Any, task: str, model_class: Any = None) -> Any:
    """The model of a task, or of `model_class`, in float32, ready to be traced.

    Its parameters are fake tensors; none is shared, so that each has its own name. Its buffers are
    real, since no checkpoint stores them (rotary frequencies, for example). `model.fake_mode` is
    the FakeTensorMode of the parameters.
    """
    if model_class:
        make, classes = model_class._from_config, (model_class,)
    else:
        auto: Any = getattr(transformers, TASKS[task].auto)
        make, classes = auto.from_config, _model_classes(auto, config)
    # sdpa traces into the fewest nodes. Gemma 2 caps its scores and BLOOM biases them, which
    # PyTorch's attention function cannot do.
    attention = "sdpa" if all(c._supports_sdpa for c in classes) else "eager"
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=torch.float32, attn_implementation=attention).eval()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    make = mode.fake_tensor_converter.from_meta_and_device
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                fake = make(mode, empty, torch.device("cpu"))
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
    _compute_positions(model)
    model.fake_mode = mode
    return model


def stored_parameters(model: Any) -> set[str]:
    """Names of the parameters of a `weightless` model whose values come from the checkpoint."""
    return {n for n, p in model.named_parameters() if not getattr(p, "computed", False)}


def _compute_positions(model: Any) -> None:
    """Compute the values of sinusoidal embeddings, which depend on their shape only.

    Marian's are parameters that checkpoints usually leave out; stored ones take precedence.
    """
    for module in model.modules():
        if hasattr(module, "create_weight") and module._parameters.get("weight") is not None:
            with torch.no_grad():
                values = module.create_weight().to(torch.float32)
            module._parameters["weight"] = torch.nn.Parameter(values, requires_grad=False)
            module.weight.computed = True


def _model_classes(auto: Any, config: Any) -> tuple[Any, ...]:
    """The classes that an auto class may build for a config; most often one."""
    entry = auto._model_mapping[type(config)]
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
