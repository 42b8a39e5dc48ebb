"""Only regular files are read: reading a FIFO may block for ever, and /dev/zero never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from adaptrix_export.errors import SourceError

_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


def require_regular(path: Path) -> int:
    """The size of a file in bytes. Raises SourceError for anything but a regular file.

    Raises OSError if the file does not exist or is not accessible.
    """
    status = path.stat()
    for is_kind, words in _KINDS:
        if is_kind(status.st_mode):
            raise SourceError(str(path), words, "a file", "put the file itself there")
    return status.st_size
