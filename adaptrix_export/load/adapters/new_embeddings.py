"""`new_embeddings.safetensors` beside an adapter: rows of added tokens, which are appended to the
base's embedding (the format of vLLM and Punica)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptrix_export.errors import AdapterError
from adaptrix_export.load.adapters.peft_keys import PREFIX
from adaptrix_export.load.files.tensors import DTYPES, read_safetensors
from adaptrix_export.plan import Array, Base, Replacement, Tensor

FILE = "new_embeddings.safetensors"
_INPUT = ("input_embeddings", "embed_tokens", "embed_tokens.weight")
_OUTPUT = ("output_embeddings", "lm_head", "lm_head.weight")


@dataclass(frozen=True)
class Appended:
    """The rows of `source`, then those of `more`, in the dtype of `source`."""

    name: str
    source: Tensor
    more: Tensor

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0] + self.more.shape[0], *self.source.shape[1:])

    def read(self) -> Array:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Array:
        cut = self.source.shape[0]
        head = self.source.rows(min(start, cut), min(stop, cut))
        tail = self.more.rows(max(start, cut) - cut, max(stop, cut) - cut)
        return np.concatenate([head, tail.astype(DTYPES[self.dtype])])


def added_rows(place: str, folder: Path, base: Base) -> list[Replacement]:
    """Replacements of embedding and head by the base's rows and the added ones.

    Raises AdapterError for rows that fit neither embedding nor head.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    family = base.architecture.family
    replacements = []
    for tensor in read_safetensors(path).tensors:
        module = (
            family.embedding if tensor.name in _INPUT
            else family.head if tensor.name in _OUTPUT
            else None
        )  # fmt: skip
        name = f"{module}.weight"
        stored = base.tensors.get(base.tied.get(name, name))
        if module is None or stored is None or tensor.shape[1:] != stored.shape[1:]:
            raise AdapterError(
                f"{place}: {FILE}: {tensor.name}", f"shape {list(tensor.shape)}",
                f"{_INPUT[0]} or {_OUTPUT[0]}, rows as wide as the base's",
                "was this adapter trained on another model?",
            )  # fmt: skip
        whole = Appended(f"{PREFIX}{name}", stored, tensor)
        site = base.architecture.site_of(module)
        # Shared: a tied head keeps following its embedding.
        replacements.append(Replacement(site, "weight", whole, shared=True))
    return replacements
