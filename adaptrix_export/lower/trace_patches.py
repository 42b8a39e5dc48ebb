"""What transformers 5.23 does that cannot be traced as it is, done otherwise while a trace runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

# The kernel for grouped products wants bfloat16 of tensors without values; the fallback computes
# the same and has a translation to ONNX.
_NEVER_GROUPED = "transformers.integrations.moe._can_use_grouped_mm"


@contextmanager
def traceable() -> Iterator[None]:
    """The patches, for as long as the context lives."""
    with patch(_NEVER_GROUPED, lambda *_: False):
        yield
