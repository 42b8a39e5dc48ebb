"""A transformers model whose parameters have no storage, for tracing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from adaptrix_export.arch.tasks import TASKS
from adaptrix_export.compat.torch import fake_mode, fake_parameter, parameters_of
from adaptrix_export.compat.transformers import mapped_classes, model_from_config, supports_sdpa


def weightless(config: Any, task: str, model_class: Any = None) -> Any:
    """The model of a task, or of `model_class`, in float32, ready to be traced.

    Its parameters are fake tensors; none is shared, so that each has its own name. Its buffers are
    real, since no checkpoint stores them (rotary frequencies, for example). `model.fake_mode` is
    the FakeTensorMode of the parameters.
    """
    if model_class:
        make, classes = partial(model_from_config, model_class), (model_class,)
    else:
        auto: Any = getattr(transformers, TASKS[task].auto)
        make, classes = auto.from_config, mapped_classes(auto, config)
    # sdpa traces into the fewest nodes. Gemma 2 caps its scores and BLOOM biases them, which
    # PyTorch's attention function cannot do.
    attention = "sdpa" if all(map(supports_sdpa, classes)) else "eager"
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=torch.float32, attn_implementation=attention).eval()
    mode = fake_mode()
    for module in model.modules():
        parameters = parameters_of(module)
        for name, parameter in parameters.items():
            if parameter is not None:
                parameters[name] = fake_parameter(mode, parameter)
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
        if hasattr(module, "create_weight") and parameters_of(module).get("weight") is not None:
            with torch.no_grad():
                values = module.create_weight().to(torch.float32)
            parameters_of(module)["weight"] = torch.nn.Parameter(values, requires_grad=False)
            module.weight.computed = True
