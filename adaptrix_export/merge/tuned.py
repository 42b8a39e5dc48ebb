"""Merges parameters with PEFT layers, on a skeleton of the model that is cached for each adapter.

A skeleton (see `peft_layers.py`) takes seconds to build and little memory, so it is used for all
sites of an adapter and freed when the lowering ends; a composition uses several at each site.
PyTorch is imported only if there is such a term.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adaptrix_export.plan import Array, Tuned

if TYPE_CHECKING:
    from adaptrix_export.merge.peft_layers import Skeleton

_skeletons: dict[tuple[Path, Path], Skeleton] = {}  # adapter and base folder -> skeleton


@contextmanager
def layers_freed() -> Iterator[None]:
    """Free the skeleton, if one was built, at the end of a lowering."""
    try:
        yield
    finally:
        _skeletons.clear()


def merged_parameter(term: Tuned, value: Array) -> Array:
    """`value`, the base's float64 parameter of `term`, merged by the tuner's layer.

    The module's other parameters are read from the base. Raises AdapterError if PEFT adapts other
    modules than the plan, UnsupportedError if the layer cannot merge.
    """
    skeleton = _skeleton(term)
    parameters = {term.parameter: value}
    for other in {"weight", "bias"} - {term.parameter}:
        name = f"{term.path}.{other}"
        stored = term.base.tensors.get(term.base.tied.get(name, name))
        if stored is not None:
            parameters[other] = stored.read().astype(np.float64)
    return skeleton.merge(term.path, parameters)[term.parameter]


def _skeleton(term: Tuned) -> Skeleton:
    key = (term.folder, term.base.folder)
    if key not in _skeletons:
        from adaptrix_export.merge.peft_layers import Skeleton

        _skeletons[key] = Skeleton.build(term)
    return _skeletons[key]
