"""What transformers does again and again while it loads a GGUF file, done once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, a GGUF file is parsed once, over a plain array, and its names are mapped once.

    Seen in transformers 5.23 and gguf 0.19: `load_gguf_checkpoint` parses the file for the config
    and again for the tensors, each string of the vocabulary as a view of a `numpy.memmap`, whose
    views are slow; and `get_gguf_hf_weights_map` makes the table of names of all layers anew for
    every module of the model. The values come from their own code, as ever.
    Without it, SmolLM2's oracle takes three times as long to load.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainReader(reader):  # type: ignore[valid-type, misc]
        """The same reader; its views are of a plain array, which keeps the mapping alive."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            import numpy as np

            self._plain = mapped.view(np.ndarray)

    try:
        gguf.GGUFReader = functools.cache(PlainReader)  # type: ignore[misc, assignment]
        gguf.get_tensor_name_map = functools.cache(name_map)
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
        gguf.get_tensor_name_map = name_map
