"""An adapter written in another format: PEFT's folder, or that of the original Adaptrix.

What a format cannot hold is refused by name. What is written is read again and compared, bit by
bit, before it is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.errors import MachineError, RecipeError
from adaptrix_export.load import Reading, open_adapter, open_base
from adaptrix_export.load.files.tensors import itemsize
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.replication import repeat_layers
from adaptrix_export.plan import Adapter, Base, Plan, Tensor
from adaptrix_export.save.adaptrix_folder import write_adaptrix
from adaptrix_export.save.peft_folder import write_peft
from adaptrix_export.save.staging import publish, staging


@dataclass(frozen=True)
class Converted:
    """What `convert` published, and what to know of how the source was read."""

    out: Path
    adapter: Adapter

    @property
    def notes(self) -> tuple[str, ...]:
        return self.adapter.notes


def convert(
    source: str, base: str, to: str, out: Path, reading: Reading | None = None
) -> Converted:
    """Read `source` against `base` and publish it at `out` in the format `to`.

    Raises InputError for what cannot be read or held; nothing is published then.
    """
    if to not in WRITERS:
        raise RecipeError("--to", repr(to), f"one of {', '.join(WRITERS)}")
    opened = open_base(base, adapters=[source])
    read = reading or Reading()
    plan = verify(repeat_layers(Plan(opened, (open_adapter(source, opened, None, read),))))
    adapter = plan.adapters[0]
    with staging(out, 2 * _nbytes(adapter)) as stage:
        WRITERS[to](adapter, plan.base, stage)
        _compare(adapter, open_adapter(str(stage), plan.base, adapter.name))
        publish(stage, out)
    return Converted(out, adapter)


def _nbytes(adapter: Adapter) -> int:
    tensors = [t for d in adapter.deltas for term in d.terms for t in term.tensors]
    tensors += [saved.tensor for saved in adapter.replacements]
    return sum(prod(t.shape) * itemsize(t.dtype) for t in tensors)


Writer = Callable[[Adapter, Base, Path], None]
WRITERS: dict[str, Writer] = {"peft": write_peft, "adaptrix": write_adaptrix}


def _compare(written: Adapter, read: Adapter) -> None:
    """Raise MachineError unless what was read again is what was written, bit for bit."""
    before, after = _contents(written), _contents(read)
    differing = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    if differing:
        raise MachineError(
            f"{written.name}: {differing[0]}", "other values when read again", "what was written",
            "report this; nothing was published",
        )  # fmt: skip


def _contents(adapter: Adapter) -> dict[str, Any]:
    """Everything that an adapter applies: parameter -> scale, and each tensor's kind and bytes."""

    def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
        return tensor.dtype, tensor.shape, tensor.read().tobytes()

    contents: dict[str, Any] = {
        f"{d.name} + {type(t).__name__}": (getattr(t, "scale", None), *map(bits, t.tensors))
        for d in adapter.deltas
        for t in d.terms
    }
    for saved in adapter.replacements:
        contents[f"{saved.name} {saved.rows}"] = (saved.shared, bits(saved.tensor))
    return contents
