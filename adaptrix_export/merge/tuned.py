"""Parameters that only a PEFT layer can merge: the model's skeleton is kept for each adapter.

The skeleton (see `peft_layers.py`) takes seconds to build and next to no memory, so it serves all
sites of an adapter and is freed when the lowering ends; a composition goes through several at
each site. No PyTorch until a term asks for it.
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

_kept: dict[tuple[Path, Path], Skeleton] = {}  # adapter and base folder -> skeleton


@contextmanager
def layers_freed() -> Iterator[None]:
    """Free the skeleton, if one was built, at the end of a lowering."""
    try:
        yield
    finally:
        _kept.clear()


def merged_parameter(term: Tuned, value: Array) -> Array:
    """`value`, the base's float64 parameter of `term`, as the tuner's layer merges it.

    The module's other parameters are read from the base. Raises AdapterError where PEFT does not
    place the adapter as the plan does, UnsupportedError where the layer cannot merge.
    """
    skeleton = _skeleton(term)
    given = {term.parameter: value}
    for other in {"weight", "bias"} - {term.parameter}:
        name = f"{term.path}.{other}"
        stored = term.base.tensors.get(term.base.tied.get(name, name))
        if stored is not None:
            given[other] = stored.read().astype(np.float64)
    return skeleton.merge(term.path, given)[term.parameter]


def _skeleton(term: Tuned) -> Skeleton:
    key = (term.folder, term.base.folder)
    if key not in _kept:
        from adaptrix_export.merge.peft_layers import Skeleton

        _kept[key] = Skeleton.build(term)
    return _kept[key]
