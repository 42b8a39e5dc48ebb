"""What a live layer computes, found by running it: the oracle for layers without a formula here.

A layer that is affine in its input is its response to unit vectors and to zero. Nothing of the
layer's own `merge` is used, so a merge that forgets something is noticed.
"""

from __future__ import annotations

from typing import Any

import torch

from adaptrix_export.errors import ParityError
from adaptrix_export.merge.in_double import in_double, tensors_of
from adaptrix_export.oracle.layer_kinds import plain_kind

BLOCK = 256  # unit vectors at a time
AFFINE = 2.0**-40  # how far a response may be from the affine one, by the largest response

# Base layer class -> whether the weight is stored (in, out), as unit vectors come out.
_KINDS = {"Linear": False, "Conv1D": True}


def probed(layer: Any, parameter: str, name: str) -> Any:
    """`weight` or `bias` that `layer` effectively has, fp64, as its base layer stores it.

    Raises ParityError for a kind of layer that cannot be probed, and for one that is not affine.
    """
    base = layer.get_base_layer()
    kind = plain_kind(base)
    with in_double(tensors_of(layer)):
        if kind == "Embedding" and parameter == "weight":
            tokens = torch.arange(base.weight.shape[0])
            return torch.cat([layer(part) for part in torch.split(tokens, BLOCK)])
        if kind not in _KINDS or parameter not in ("weight", "bias"):
            raise ParityError(name, f"the oracle has no row for {type(layer).__name__}({kind})")
        inputs = base.weight.shape[0 if _KINDS[kind] else 1]
        shift = layer(torch.zeros(1, inputs, dtype=torch.float64))[0]
        if parameter == "bias":
            return shift
        eye = torch.eye(inputs, dtype=torch.float64)
        weight = torch.cat([layer(part) for part in torch.split(eye, BLOCK)]) - shift
        _check_affine(layer, weight, shift, name)
        return weight if _KINDS[kind] else weight.T


def _check_affine(layer: Any, weight: Any, shift: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, len(weight), dtype=torch.float64, generator=generator)
    output, expected = layer(vectors), vectors @ weight + shift
    if not bool((output - expected).abs().max() <= AFFINE * expected.abs().max()):
        raise ParityError(name, "a layer that is not affine in its input", "a mergeable one")
