"""Small numbers packed into words: bit streams, and what is decoded only as a whole."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import numpy as np

from adaptrix_export.load.files.tensors import ByRows
from adaptrix_export.plan import Array

WORD = 32  # bits


class Whole(ByRows):
    """A tensor whose rows lie across those of its file: the last one decoded is kept."""

    def rows(self, start: int, stop: int) -> Array:
        return _decoded(self)[start:stop]

    @abstractmethod
    def decode(self) -> Array: ...


@lru_cache(maxsize=1)
def _decoded(tensor: Whole) -> Array:
    return tensor.decode()


def words_of(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` numbers of `bits` bits, without a gap."""
    return -(-count * bits // WORD)


def unpack_words(words: Array, bits: int, count: int, axis: int) -> Array:
    """uint8 numbers of `bits` bits in int32 words, lowest bits first, packed along `axis`.

    Both GPTQ and compressed-tensors pack so; a number may lie across two words.
    """
    lined = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4", copy=False)
    stored = lined.view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        numbers = (stored[..., None] >> shifts) & np.uint8(2**bits - 1)
    else:
        single = np.unpackbits(stored, axis=-1, bitorder="little")
        whole = single[..., : single.shape[-1] // bits * bits]
        weights = (1 << np.arange(bits)).astype(np.uint8)
        numbers = whole.reshape(*whole.shape[:-1], -1, bits) @ weights
    flat = numbers.reshape(*lined.shape[:-1], -1)[..., :count]
    return np.moveaxis(flat, -1, axis)
