"""A file written once, front to back, hashed as it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

from adaptrix_export.plan import Array

COPY = 4 << 20  # bytes in a copied piece


class HashingWriter:
    """Context manager; `hexdigest` is the sha256 of everything written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> HashingWriter:
        self._file = self.path.open("xb", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; returns its size."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.position += len(view)
        size = len(view)
        while view:  # an unbuffered write may stop short
            view = view[self._file.write(view) :]
        return size

    def write_array(self, values: Array) -> int:
        """Write an array's values, row by row; returns the bytes written."""
        contiguous = values if values.flags.c_contiguous else values.copy(order="C")
        return self.write(contiguous.reshape(-1).view("uint8").data)

    def align(self, boundary: int) -> None:
        """Zeros up to the next multiple of `boundary`."""
        gap = -self.position % boundary
        if gap:
            self.write(b"\0" * gap)

    def copy(self, source: Path, offset: int, size: int) -> int:
        """Copy `size` bytes of another file."""
        with source.open("rb", buffering=0) as file:
            file.seek(offset)
            left = size
            while left:
                piece = file.read(min(COPY, left))
                if not piece:
                    raise EOFError(f"{source.name} ended {left} bytes early")
                left -= self.write(piece)
        return size
