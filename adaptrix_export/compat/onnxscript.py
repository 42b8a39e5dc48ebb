"""What onnxscript matches too loosely."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch


@contextmanager
def exactly_matched() -> Iterator[None]:
    """Rewrite rules take a constant for the one they know only if it is that one.

    Seen in onnxscript 0.7. Without it rules take 1e-8 for 0 and 1.00001 for 1: the epsilon of a
    norm is dropped from a traced graph.
    """
    near = 2.0**-22  # what two roundings to float32 can be apart

    def same(a: float, b: float, *, rel_tol: float = 0.0, abs_tol: float = 0.0) -> bool:
        return math.isclose(a, b, rel_tol=min(rel_tol, near))

    with patch("onnxscript.rewriter._matcher.math", SimpleNamespace(isclose=same)):
        yield
