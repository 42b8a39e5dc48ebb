"""How many bytes a base's tensors take in a graph, quantized or not, before anything is read."""

from __future__ import annotations

from math import prod

from adaptrix_export.plan import Base
from adaptrix_export.precision.settings import Storage

FLOAT = 4  # bytes of a value of float32


def graph_bytes(base: Base, storage: Storage) -> int:
    """Bytes of all tensors: float32, but for matrices as they are stored.

    A tied head is not counted: it shares the embedding's bytes.
    """
    return sum(
        _stored_bytes(base, name, tuple(tensor.shape), storage)
        for name, tensor in base.tensors.items()
    )


def _stored_bytes(base: Base, name: str, shape: tuple[int, ...], storage: Storage) -> int:
    module, _, parameter = name.rpartition(".")
    settings, floats = storage.quantization, (FLOAT if len(shape) < 2 else storage.width)
    if settings is None or parameter != "weight" or len(shape) != 2 or settings.keeps_float(module):
        return floats * prod(shape)
    is_end = module in (base.architecture.family.embedding, base.architecture.family.head)
    bits = settings.embedding if is_end else settings.bits_of(module)
    spec = None if bits is None else settings.spec(bits, shape[1])
    return FLOAT * prod(shape) if spec is None else spec.nbytes(shape[0], shape[1])
