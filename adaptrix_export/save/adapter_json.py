"""JSON files of adapters, and the single term of a site that an adapter file can express."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.plan import Adapter, Delta, Term
from adaptrix_export.save.machine_paths import without_machine_paths


def only_term(adapter: Adapter, delta: Delta) -> Term:
    if len(delta.terms) == 1:
        return delta.terms[0]
    raise UnsupportedError(
        f"{adapter.name}: {delta.name}", f"a sum of {len(delta.terms)} terms", "one term a site",
        "convert the adapters one by one",
    )  # fmt: skip


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(without_machine_paths(dict(value)), indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(without_machine_paths(dict(value)), sort_keys=True, separators=(",", ":"))
