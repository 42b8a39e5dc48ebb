"""Pass: one vector a row, beside the hidden states of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from adaptrix_export.arch.tasks import FEATURES
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.load.sentence import AUTO, saved_pooling
from adaptrix_export.plan import Plan


@dataclass(frozen=True)
class Pool:
    """`kind` is auto (as the base's files say), or a row of `POOLINGS`, or several
    joined by `+`; see `graph/rewrite/pooling.py`."""

    kind: str

    def __call__(self, plan: Plan) -> Plan:
        """Raises UnsupportedError for a task whose graph has no hidden states, SourceError for a
        base that does not say how it pools."""
        if plan.base.task != FEATURES:
            raise UnsupportedError(
                f"pooling {self.kind}", f"task {plan.base.task}", FEATURES, "leave pooling out"
            )
        kind = saved_pooling(plan.base.folder) if self.kind == AUTO else self.kind
        return plan.after(self, pooling=kind)
