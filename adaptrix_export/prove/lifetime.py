"""A checking process ends with the process that asked for it, however that one ends."""

from __future__ import annotations

import os
import threading
import time

PARENT = "ADAPTRIX_EXPORT_PARENT"
EVERY_S = 1.0


def end_with_parent() -> None:
    """Watch the process whose number is in the environment; when it is gone, end this one.

    A process without its parent is given to another one, on every system.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
