"""How the script of a client is called, and what it answers: one JSON line a row."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Expected = Mapping[str, Any]
Row = Callable[[Path, Expected], str]


def main(rows: Mapping[str, Row], arguments: Sequence[str]) -> int:
    """FOLDER NAME...: each row's detail, or what went wrong; 1 if anything did."""
    folder, *names = arguments
    expected = json.loads(Path(folder, "expected.json").read_text())
    failed = False
    for name in names or rows:
        try:
            answer = {"row": name, "passed": True, "detail": rows[name](Path(folder), expected)}
        except Exception as error:  # noqa: BLE001  # whatever a client raises is its answer
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            answer = {"row": name, "passed": False, "detail": f"{what} ({place})"}
            failed = True
        print(json.dumps(answer), flush=True)
    return int(failed)


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed here."""
    known = {}
    for name in names:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known
