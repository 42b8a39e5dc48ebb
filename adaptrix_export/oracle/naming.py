"""What a report calls the oracle: made of facts, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FILES = "the original files"
ADJUSTED = "the original base and the adapters as adjusted"
REDISTRIBUTED = "the original base and the redistributed adapter"
EXECUTED = (
    "PyTorch executing the plan: each adapter's delta as stock PEFT runs it alone, "
    "composed in float64"
)


@dataclass(frozen=True)
class OracleFacts:
    """What PEFT was given in the place of the original files.

    `redistributed`: adapters that were moved onto a few layers; `adjusted`: adapters written anew
    as they were adjusted; `converted`: names of adapters of other formats, written in PEFT's (a
    fault of our reader is then a fault of the copy, too); `approximated`: names of adapters of
    which the nearest LoRA was taken.
    """

    redistributed: bool = False
    adjusted: bool = False
    converted: tuple[str, ...] = ()
    approximated: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> OracleFacts:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(
            redistributed=document["redistributed"],
            adjusted=document["adjusted"],
            converted=tuple(document["converted"]),
            approximated=tuple(document["approximated"]),
        )


FROM_FILES = OracleFacts()


def oracle_name(
    facts: OracleFacts, *, composed: bool = False, gated: bool = False, apart: bool = False
) -> str:
    """One line for the report.

    `composed`: PyTorch executes a composition; `gated`: with the plan's gates; `apart`: each
    adapter by itself.
    """
    source = FILES
    if facts.redistributed:
        source = REDISTRIBUTED
    elif facts.adjusted:
        source = ADJUSTED
    name = EXECUTED if composed else f"stock transformers + PEFT on {source}"
    if apart:
        name += ", each adapter by itself"
    if gated:
        name += ", with the plan's gates as forward hooks on its layers"
    if facts.adjusted and composed:
        name += " (the adapters as adjusted)"
    if facts.converted:
        name += f" (adapter converted to PEFT form: {', '.join(facts.converted)})"
    if facts.approximated:
        name += f", with {', '.join(facts.approximated)} approximated by SVD"
    return name
