"""Tries a front end on a small replica of a model before it draws the model itself.

The replica goes the whole way: saved as a checkpoint, drawn, written, and compared with PyTorch in
every case of the full proof. That happens in the checking process, once: the verdict is kept in the
user's cache by the replica's config, our own sources and the versions of all that took part.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.errors import CheckerError
from adaptrix_export.graph.frontends.draw import Verdict
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Progress
from adaptrix_export.prove.checker import Checker, ask
from adaptrix_export.prove.preflight.replica import shrunk
from adaptrix_export.prove.preflight.sources import sources_hash, versions

TIMEOUT_S = 600.0
CACHE = "ADAPTRIX_EXPORT_CACHE"
FORMAT = 3  # of a verdict; another number asks all questions anew


@dataclass(frozen=True)
class Question:
    """Does this front end draw models of this kind right? `config` is the replica's."""

    config: Mapping[str, Any]
    task: str
    provider: str
    frontend: str


def preflight(
    plan: Plan,
    provider: str,
    frontend: str,
    progress: Progress,
    checker: Checker | None = None,
) -> Verdict:
    """The verdict on a front end for a plan's model, from the cache where it is known, else from
    the checking process.

    A process that a library crashes is a verdict, too, but not one that is kept. Raises
    CheckerError for one that was killed, was late or failed by a fault of ours: no verdict.
    """
    from adaptrix_export.graph.frontends.live_config import live_config

    config = json.loads(json.dumps(live_config(plan).to_dict(), sort_keys=True, default=str))
    question = Question(shrunk(config), plan.base.task, provider, frontend)
    entry = _entry(question)
    known = _kept(entry)
    if known is not None:
        return known
    try:
        document = ask("preflight", json.dumps(asdict(question)), progress, TIMEOUT_S, checker)
    except CheckerError as error:
        if not error.crashed:
            raise
        return Verdict(False, f"the small replica failed: {error}")
    verdict = Verdict(bool(document["passed"]), str(document["why"]))
    _keep(entry, verdict)
    return verdict


def cache_folder() -> Path:
    """ADAPTRIX_EXPORT_CACHE, else adaptrix_export in XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get(CACHE)
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "adaptrix_export"


def _entry(question: Question) -> Path:
    key = {
        **asdict(question), "versions": versions(), "sources": sources_hash(), "format": FORMAT,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "preflight" / f"{digest}.json"


def _kept(entry: Path) -> Verdict | None:
    """The verdict in a cache file; None where there is none, or none that can be read."""
    try:
        document = json.loads(entry.read_text(encoding="utf-8"))
        passed, why = document["passed"], document["why"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Verdict(passed, why) if isinstance(passed, bool) and isinstance(why, str) else None


def _keep(entry: Path, verdict: Verdict) -> None:
    """Write the file whole or not at all; a cache that cannot be written is done without."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=entry.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(asdict(verdict), file)
        os.replace(file.name, entry)
    except OSError:
        return
