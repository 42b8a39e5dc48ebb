"""A file that is written sequentially and hashed while it is written.

Hashing and writing are done in a separate thread, while the caller computes the next bytes.
Writeback to disk is started early, so that the flush before publishing waits for the last part
only.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType

from adaptrix_export.plan import Array

COPY = 4 << 20  # bytes in a copied piece
AHEAD = 32 << 20  # bytes that may wait to be written; a larger array waits alone
FLUSHED = 32 << 20  # bytes after which the system is asked to start writing them out


class HashingWriter:
    """Context manager; `hexdigest` is the sha256 of everything written so far.

    Do not change bytes after passing them to `write`. An error of writing is raised by the next
    call, at the latest when the context ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._hash = hashlib.sha256()
        self._waiting: deque[memoryview] = deque()
        self._bytes = 0  # of what is waiting or being written
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None

    def __enter__(self) -> HashingWriter:
        self._file = self.path.open("xb", buffering=0)
        self._thread = threading.Thread(target=self._run, name=f"write {self.path.name}")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closing = True
            if error is not None:  # the rest is not needed
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        self._file.close()
        if error is None:
            self._raise()

    @property
    def hexdigest(self) -> str:
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._error is not None)
        self._raise()
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; returns its size."""
        view = memoryview(data).cast("B")
        size = len(view)
        with self._changed:
            self._changed.wait_for(
                lambda: self._bytes == 0 or self._bytes + size <= AHEAD or self._error is not None
            )
            if size and self._error is None:
                self._waiting.append(view)
                self._bytes += size
                self._changed.notify_all()
        self._raise()
        self.position += size
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

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        flushed = written = 0
        try:
            while (view := self._next()) is not None:
                self._hash.update(view)
                size = len(view)
                while view:  # an unbuffered write may stop short
                    view = view[self._file.write(view) :]
                written += size
                if written - flushed >= FLUSHED:
                    _start_writeback(self._file.fileno(), flushed, written - flushed)
                    flushed = written
                with self._changed:
                    self._bytes -= size
                    self._changed.notify_all()
        except (OSError, ValueError, MemoryError) as error:
            with self._changed:
                self._error = error  # raised by whoever calls next
                self._changed.notify_all()

    def _next(self) -> memoryview | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
            return self._waiting.popleft() if self._waiting else None


def _start_writeback(handle: int, offset: int, size: int) -> None:
    """Start writeback: on POSIX_FADV_DONTNEED Linux writes dirty pages, without dropping them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, size, os.POSIX_FADV_DONTNEED)
