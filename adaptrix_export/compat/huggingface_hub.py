"""What huggingface_hub does not offer by a public name, in one place for all its versions."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Version 1 sends through httpx, version 2 through httpx2.
_TRANSPORTS = ("httpx2", "httpx")


def transport_errors() -> tuple[type[Exception], ...]:
    """What a connection that fails raises.

    Seen in huggingface_hub 1.0 to 2.4. Without it a hub that cannot be reached is an internal
    error.
    """
    installed = [name for name in _TRANSPORTS if importlib.util.find_spec(name) is not None]
    return tuple(importlib.import_module(name).TransportError for name in installed)


def ignored(operation: Any) -> bool:
    """Whether the hub left this file out of a commit, as a .gitignore there told it to.

    Seen in huggingface_hub 1.0 to 2.4. Without it a file that the hub refuses to keep is missing
    there in silence.
    """
    return bool(getattr(operation, "_should_ignore", False))
