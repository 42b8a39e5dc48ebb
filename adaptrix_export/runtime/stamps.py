"""The two numbers in the header of an `.onnx_adapter`, and what a graph says about itself.

ONNX Runtime stores a model version and an adapter version in each adapter file and compares
neither. Here the first stands for the graph and the weights that the adapter belongs to, the
second for the adapter's own values, so that a file for another base, or one whose bytes were
changed, is known before anything runs. Both are the first 31 bits of a sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The key of the graph's metadata that holds the facts a runtime needs, as one JSON object:
# `shared_cache` (the cache may be updated in place), `model_version`, `slots`, `rows`.
FACTS = "adaptrix"


def number(digest: bytes) -> int:
    """A positive int32 from a sha256; never 0, which files without a stamp have."""
    return int.from_bytes(digest[:4], "big") % (2**31 - 1) + 1


def model_version(*parts: object) -> int:
    """The stamp of a graph, from whatever decides what its slots mean."""
    text = json.dumps(parts, sort_keys=True)
    return number(hashlib.sha256(text.encode()).digest())


def adapter_version(values: Mapping[str, NDArray[Any]]) -> int:
    """The stamp of an adapter: of the names, shapes, types and bytes of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        digest.update(json.dumps([name, list(array.shape), str(array.dtype)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return number(digest.digest())
