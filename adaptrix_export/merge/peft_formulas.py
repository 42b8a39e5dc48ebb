"""PEFT's `add_weighted_adapter` on the factors of LoRA adapters, in float64.

A and B are combined separately, each with the square root of weight times scale; A has the sign.
Signs are elected before weighting and a sum of zero elects plus, as in PEFT 0.21. One defect of
PEFT is not reproduced: if the first adapter is an rsLoRA, its result is too large by sqrt(rank),
because the new adapter inherits the setting.
"""

from __future__ import annotations

from collections.abc import Callable
from math import copysign, sqrt
from typing import TYPE_CHECKING

import numpy as np

from adaptrix_export.merge.aligned import Factors
from adaptrix_export.merge.elections import random_mask
from adaptrix_export.plan import Array, Composed, Tensor, low_ranks
from adaptrix_export.plan.methods import METHODS

if TYPE_CHECKING:
    from adaptrix_export.merge.blocks import Block

Drop = Callable[[Array, str, str], Array]


def peft_factors(term: Composed) -> Factors:
    """(out, r) and (r, in): B and A of PEFT's new adapter, whose scale is one."""
    pairs = [(part, t) for part in term.parts for t in low_ranks(part.terms)]
    strengths = [part.weight * t.scale for part, t in pairs]
    signed = [copysign(sqrt(abs(s)), s) if s else 0.0 for s in strengths]
    names = [part.adapter for part, _ in pairs]
    a = _combined(term, names, [t.a for _, t in pairs], signed, "lora_A")
    b = _combined(term, names, [t.b for _, t in pairs], [abs(s) for s in signed], "lora_B")
    return Factors(b, a)


def _combined(
    term: Composed, names: list[str], tensors: list[Tensor], weights: list[float], factor: str
) -> Array:
    method, density = METHODS[term.method], term.density or 1.0
    values = [t.read().astype(np.float64) for t in tensors]
    if method.sparsify == "magnitude" and density < 1:
        values = [_largest(value, density) for value in values]
    if method.sparsify == "random" and density < 1:
        masks: list[Block] = [
            random_mask(term.seed, name, f"{term.name}.{factor}", (v.shape[0], v.shape[1]), density)
            for name, v in zip(names, values, strict=True)
        ]
        values = [
            np.where(mask(0, len(v)), v, 0.0) / density
            for v, mask in zip(values, masks, strict=True)
        ]
    stack = np.stack(values)
    weighted = stack * np.array(weights)[:, None, None]
    if not method.elects:
        whole: Array = weighted.sum(axis=0)
        return whole
    signs = np.sign(stack)
    votes = (stack if term.election == "total" else signs).sum(axis=0)
    agree = signs == np.where(votes >= 0, 1, -1)
    mean: Array = (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return mean


def _largest(values: Array, density: float) -> Array:
    """PEFT's pruning. torch.topk decides among equal magnitudes, so torch.topk is used here."""
    import torch

    sizes = torch.from_numpy(np.abs(values).astype(np.float32).reshape(-1))
    chosen = torch.topk(sizes, k=int(density * values.size), largest=True)[1].numpy()
    mask = np.zeros(values.size)
    mask[chosen] = 1
    return values * mask.reshape(values.shape)
