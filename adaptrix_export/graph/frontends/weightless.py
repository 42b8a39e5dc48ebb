"""A transformers model without the memory of its weights, for tracing."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptrix_export.arch.tasks import TASKS


def weightless(config: Any, task: str, found: Any = None) -> Any:
    """The model of a task, or of the class `found`, in float32, ready to be traced.

    Its parameters are fake tensors, a shape and nothing else; none is shared, so that each keeps
    a name of its own. Its buffers are real: rotary frequencies, say, which no checkpoint holds.
    `model.fake_mode` is the mode that the parameters belong to.
    """
    auto: Any = found or getattr(transformers, TASKS[task].auto)
    make = found._from_config if found else auto.from_config
    attention = ("sdpa" if found._supports_sdpa else "eager") if found else _attention(auto, config)
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
    """Names of the parameters of a `weightless` model whose values only a checkpoint holds."""
    return {n for n, p in model.named_parameters() if not getattr(p, "computed", False)}


def _compute_positions(model: Any) -> None:
    """Give sinusoidal embeddings, which follow from their shape, the values that they have.

    Marian's are parameters that no checkpoint holds; one that holds them takes precedence.
    """
    for module in model.modules():
        if hasattr(module, "create_weight") and module._parameters.get("weight") is not None:
            with torch.no_grad():
                values = module.create_weight().to(torch.float32)
            module._parameters["weight"] = torch.nn.Parameter(values, requires_grad=False)
            module.weight.computed = True


def _attention(auto: Any, config: Any) -> str:
    """The implementation that traces into the fewest nodes, where the model has it: Gemma 2 caps
    its scores and BLOOM biases them, which PyTorch's own attention function cannot."""
    found = auto._model_mapping[type(config)]
    classes = found if isinstance(found, (tuple, list)) else (found,)
    return "sdpa" if all(c._supports_sdpa for c in classes) else "eager"
