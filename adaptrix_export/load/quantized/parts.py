"""Quantized weights that lie in a file in parts: one module's, brought together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptrix_export.errors import SourceError
from adaptrix_export.load.files.tensors import FLOATS, StoredTensor
from adaptrix_export.plan import Tensor

DAMAGED = "save or fetch the checkpoint again"


@dataclass(frozen=True)
class Module:
    """One module's parts, in the order asked for; `name` is its live path."""

    name: str
    parts: tuple[StoredTensor, ...]

    def stored(self, ending: str) -> str:
        """The name that a tensor of this module has in the files."""
        return f"{self.parts[0].name.rpartition('.')[0]}.{ending}"


def gathered(
    place: str,
    stored: Mapping[str, StoredTensor],
    endings: Sequence[str],
    plain: dict[str, Tensor],
    ignored: Sequence[str] = (),
) -> Iterator[Module]:
    """Each module that has the first of `endings`, in file order; floats that are no part of one
    go into `plain` as they are.

    Raises SourceError for a part that is missing, and for what is neither a part nor a float.
    """
    first = endings[0]
    for name, tensor in stored.items():
        module, _, ending = name.rpartition(".")
        if ending == first:
            parts = [stored.get(f"{module}.{other}") for other in endings]
            missing = next((e for e, part in zip(endings, parts, strict=True) if part is None), "")
            if missing:
                raise SourceError(f"{place}: {module}.{missing}", "missing", "one", DAMAGED)
            yield Module(module, tuple(part for part in parts if part is not None))
        elif f"{module}.{first}" in stored and ending in (*endings, *ignored):
            continue
        elif tensor.dtype in FLOATS:
            plain[name] = tensor
        else:
            raise SourceError(
                f"{place}: {name}", f"{tensor.dtype}, and no part of a quantized weight",
                f"floats, or one of {', '.join(endings)}", DAMAGED,
            )  # fmt: skip


def check_part(
    place: str, tensor: StoredTensor, dtypes: Sequence[str], shape: tuple[int, ...]
) -> None:
    """Raise SourceError for a part of another dtype or shape than the others need."""
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise SourceError(
            f"{place}: {tensor.name}", f"{tensor.dtype} of shape {list(tensor.shape)}",
            f"{' or '.join(dtypes)} of shape {list(shape)}", DAMAGED,
        )  # fmt: skip
