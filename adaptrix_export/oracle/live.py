"""The weight that a live PEFT model effectively has, taken from the layers that it runs.

One row a layer kind in `EFFECTS`. Nothing is parsed from adapter files and no formula of the
lowering is used: factors and scalings are the live layer's own attributes. A layer kind without a
row is probed (see `probe.py`): what it does to inputs is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.layer_kinds import plain_kind

Effect = Callable[[Any, str], Any]


def live_parameter(model: Any, name: str, widen: bool = True) -> tuple[Any, bool]:
    """The parameter (or buffer) `name` of the plain model, and whether an adapter acts on it.

    `model` is the transformers model inside the PEFT model, its modules replaced by PEFT's.
    Returns an fp64 tensor in the layout that the plain model stores; without `widen`, the model's
    own one where no adapter acts on it. Raises `ParityError` for an
    unknown name or layer kind.
    """
    module, path = model, name.split(".")
    for position, part in enumerate(path[:-1]):
        child = getattr(module, part, None)
        if child is None:
            raise ParityError(name, f"the reference has no module {part!r}")
        if type(child).__name__ == "LNTuningLayer":
            return live_parameter(_chosen(child), ".".join(path[position + 1 :]))[0], True
        if _is_tuner_layer(child):
            return _effect(child, name, ".".join(path[position + 1 :]))
        if _is_wrapper(child):
            return _saved(child, name, ".".join(path[position + 1 :]))
        module = child
    own = _own(module, path[-1], name)
    return own.double() if widen else own, False


def live_delta(model: Any, name: str, base: Any) -> tuple[Any, Any]:
    """What the active adapters add to the parameter `name`, and the layer that does, or Nones.

    `base` is the fp64 value without them. A formula of `EFFECTS` gives the delta itself, without
    the rounding of a sum with the base. None, too, for a parameter that is replaced.
    """
    module, path = model, name.split(".")
    for position, part in enumerate(path[:-1]):
        module = getattr(module, part)
        if _is_wrapper(module) or type(module).__name__ == "LNTuningLayer":
            return None, None
        if _is_tuner_layer(module):
            parameter = ".".join(path[position + 1 :])
            kind = kind_of(module)
            if kind in EFFECTS and not parameter.startswith("out_proj."):
                return EFFECTS[kind](module, parameter), module
            value, changed = live_parameter(model, name)
            return (value - base, module) if changed else (None, None)
    return None, None


def live_factors(layer: Any) -> list[tuple[Any, Any, float]] | None:
    """(B, A, scaling) in fp64 of each active adapter of a plain LoRA layer; None for others."""
    kinds = ("lora.Linear(Linear)", "lora.Linear(Conv1D)", "lora.Embedding(Embedding)")
    if kind_of(layer) not in kinds:
        return None
    factors = []
    for adapter in layer.active_adapters:
        if adapter in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        elif adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        else:
            continue
        scale = float(layer.scaling[adapter])
        factors.append((b.detach().double(), a.detach().double(), scale))
    return factors


def _own(module: Any, attribute: str, name: str) -> Any:
    value = getattr(module, attribute, None)
    if value is None or not hasattr(value, "double"):
        raise ParityError(name, "the reference has no parameter of that name")
    return value.detach()


def _chosen(layer: Any) -> Any:
    """LN tuning runs a trained copy of the norm in the place of the base's."""
    return layer.ln_tuning_layers[layer.active_adapters[0]]


def _is_tuner_layer(module: Any) -> bool:
    return any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__)


def _is_wrapper(module: Any) -> bool:
    return any(c.__name__ == "AuxiliaryTrainingWrapper" for c in type(module).__mro__)


def _saved(wrapper: Any, name: str, rest: str) -> tuple[Any, bool]:
    """Inside `modules_to_save`: the active adapter's copy, or the original where none is active."""
    if type(wrapper).__name__ == "TrainableTokensWrapper":
        return _token_rows(wrapper.token_adapter, name, rest)
    if type(wrapper).__name__ != "ModulesToSaveWrapper":
        raise ParityError(name, f"the oracle has no row for {type(wrapper).__name__}")
    active = wrapper.active_adapters
    module = wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    value, changed = live_parameter(module, rest)
    return value, changed or bool(active)


def _token_rows(layer: Any, name: str, parameter: str) -> tuple[Any, bool]:
    """The base's rows, those of each active adapter's tokens replaced by the trained ones."""
    value = _own(layer.get_base_layer(), parameter, name).double()
    active = [a for a in layer.active_adapters if a in layer.trainable_tokens_delta]
    if parameter != "weight" or not active:
        return value, False
    value = value.clone()
    for adapter in active:
        rows = layer.token_indices[adapter]
        value[rows] = layer.trainable_tokens_delta[adapter].detach().double()
    return value, True


def _effect(layer: Any, name: str, parameter: str) -> tuple[Any, bool]:
    kind = kind_of(layer)
    if kind.startswith("lora.ParamWrapper("):
        return _wrapped_parameter(layer, name, parameter)
    if parameter.startswith("out_proj."):  # MultiheadAttention's: its `merge` adds it twice
        inside = layer.get_base_layer().out_proj
        once, changed = live_parameter(layer.get_base_layer(), parameter)
        own = _own(inside.get_base_layer(), parameter.removeprefix("out_proj."), name).double()
        return 2 * once - own, changed
    effect = EFFECTS.get(kind)
    base = _own(layer.get_base_layer(), parameter, name).double()
    if effect is None:
        from adaptrix_export.oracle.probe import probed  # PyTorch

        return probed(layer, parameter, name), True
    added = effect(layer, parameter)
    return (base, False) if added is None else (base + added, True)


def kind_of(layer: Any) -> str:
    """`tuner.Class(BaseLayer)`, with `+Variant` for each LoRA variant (DoRA, ...) in use."""
    tuner = type(layer).__module__.split(".")[2]  # peft.tuners.<tuner>.layer
    base = plain_kind(layer.get_base_layer())
    variants = {type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()}
    return f"{tuner}.{type(layer).__name__}({base})" + "".join(f"+{v}" for v in sorted(variants))


def _lora_linear(layer: Any, parameter: str) -> Any:
    """sum over active adapters of scaling * B @ A, shape (out, in); for a bias scaling * b_B."""
    total = None
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        up = layer.lora_B[adapter]
        if parameter == "weight":
            term = up.weight.detach().double() @ layer.lora_A[adapter].weight.detach().double()
        elif up.bias is not None:
            term = up.bias.detach().double()
        else:
            continue
        term = layer.scaling[adapter] * term
        total = term if total is None else total + term
    return total


def _lora_conv1d(layer: Any, parameter: str) -> Any:
    """The same, laid out (in, out) as GPT-2's Conv1D stores its weight."""
    added = _lora_linear(layer, parameter)
    return added.T if parameter == "weight" and added is not None else added


def _lora_convolution(layer: Any, parameter: str) -> Any:
    """scaling * B @ A over the flattened kernels, in the kernel's own shape; one group."""
    if parameter != "weight":
        return None
    weight, total = layer.get_base_layer().weight, None
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a = layer.lora_A[adapter].weight.detach().double().flatten(1)
            b = layer.lora_B[adapter].weight.detach().double().flatten(1)
            term = layer.scaling[adapter] * (b @ a).view(weight.shape)
            total = term if total is None else total + term
    return total


def _lora_attention(layer: Any, parameter: str) -> Any:
    """scaling * B @ A on the fused input projection of MultiheadAttention."""
    return _lora_linear(layer, "weight") if parameter == "in_proj_weight" else None


def _lora_embedding(layer: Any, parameter: str) -> Any:
    """scaling * (B @ A)^T, shape (tokens, width): the factors act on one-hot columns."""
    total = None
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_embedding_A:
            continue
        a = layer.lora_embedding_A[adapter].detach().double()
        term = layer.scaling[adapter] * (layer.lora_embedding_B[adapter].detach().double() @ a).T
        total = term if total is None else total + term
    return total


def _dora(turned: bool) -> Effect:
    """Adapters in turn, V the weight so far: DoRA makes it m / |W + s BA| * (V + s BA), plain LoRA
    V + s BA. The layer's forward pass scales what it has so far, but takes the norm of the base.

    W is laid out (out, in) here; `turned` says that the plain model stores it the other way. The
    norm is over the inputs of an output. Bias terms are those of plain LoRA.
    """

    def effect(layer: Any, parameter: str) -> Any:
        if parameter != "weight":
            return _lora_linear(layer, parameter)
        weight = layer.get_base_layer().weight.detach().double()
        weight = weight.T if turned else weight
        so_far, changed = weight, False
        for adapter in layer.active_adapters:
            if adapter not in layer.scaling:
                continue
            delta, changed = _low_rank(layer, adapter), True
            so_far = so_far + delta
            if adapter in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[adapter].weight.detach().double()
                norm = (weight + delta).norm(dim=1)
                so_far = (magnitude.reshape(-1) / norm)[:, None] * so_far
        total = so_far - weight
        return None if not changed else total.T if turned else total

    return effect


def _low_rank(layer: Any, adapter: str) -> Any:
    """scaling * B @ A of one adapter, whatever the layer calls its factors."""
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.scaling[adapter] * (b.detach().double() @ a.detach().double())


def _wrapped_parameter(layer: Any, name: str, parameter: str) -> tuple[Any, bool]:
    """LoRA on a parameter: one wrapper for each, the innermost holding the module.

    Expert e of a parameter (experts, out, in) gains scaling * b_e @ a_e, with a_e rows
    e*r..(e+1)*r of A and b_e every `experts`-th column of B, from e on.
    """
    value = _own(layer.get_base_layer(), parameter, name).double()
    changed = False
    while type(layer).__name__ == "ParamWrapper":
        for adapter in layer.active_adapters:
            if layer.parameter_name != parameter or adapter not in layer.lora_A:
                continue
            a = layer.lora_A[adapter].weight.detach().double()
            b = layer.lora_B[adapter].weight.detach().double()
            scale, count = layer.scaling[adapter], layer.num_experts
            step = len(a) // count
            added = [scale * (b[:, e::count] @ a[e * step : (e + 1) * step]) for e in range(count)]
            delta = added[0] if value.dim() == 2 else _stacked(added)
            if value.dim() == 3 and getattr(layer.get_base_layer(), "is_transposed", False):
                delta = delta.transpose(1, 2)
            value, changed = value + delta, True
        layer = layer.base_layer
    return value, changed


def _stacked(parts: list[Any]) -> Any:
    import torch

    return torch.stack(parts)


EFFECTS: dict[str, Effect] = {
    "lora.Linear(Linear)": _lora_linear,
    "lora.Linear(Conv1D)": _lora_conv1d,
    "lora.Embedding(Embedding)": _lora_embedding,
    "lora.Conv1d(Conv1d)": _lora_convolution,
    "lora.Conv2d(Conv2d)": _lora_convolution,
    "lora.Conv3d(Conv3d)": _lora_convolution,
    "lora.MultiheadAttention(MultiheadAttention)": _lora_attention,
    "lora.Linear(Linear)+DoraLinearVariant": _dora(turned=False),
    "lora.Linear(Conv1D)+DoraLinearVariant": _dora(turned=True),
    "lora.Embedding(Embedding)+DoraEmbeddingVariant": _dora(turned=True),
}
