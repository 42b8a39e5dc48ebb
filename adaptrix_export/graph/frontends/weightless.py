"""A transformers model without the memory of its weights, for tracing."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptrix_export.arch.tasks import TASKS


def weightless(config: Any, task: str) -> Any:
    """The model of a task, in float32, ready to be traced.

    Its parameters are fake tensors, a shape and nothing else; none is shared, so that each keeps
    a name of its own. Its buffers are real: rotary frequencies, say, which no checkpoint holds.
    `model.fake_mode` is the mode that the parameters belong to.
    """
    auto: Any = getattr(transformers, TASKS[task].auto)
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(
            config, dtype=torch.float32, attn_implementation=_attention(auto, config)
        ).eval()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    make = mode.fake_tensor_converter.from_meta_and_device
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                fake = make(mode, empty, torch.device("cpu"))
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
    model.fake_mode = mode
    return model


def _attention(auto: Any, config: Any) -> str:
    """The implementation that traces into the fewest nodes, where the model has it: Gemma 2 caps
    its scores and BLOOM biases them, which PyTorch's own attention function cannot."""
    found = auto._model_mapping[type(config)]
    classes = found if isinstance(found, (tuple, list)) else (found,)
    return "sdpa" if all(c._supports_sdpa for c in classes) else "eager"
