"""Many builds: each published as ever, whole or not at all, in this process or in several.

A build that failed does not stop the others. One whose artifact is there already, of the same
recipe, inputs and versions, is not done again: a batch that was stopped goes on where it was.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptrix_export import __version__
from adaptrix_export.errors import CheckerError, RecipeError
from adaptrix_export.package.manifest import check_hashes, library_versions, read_manifest
from adaptrix_export.plan import Plan
from adaptrix_export.recipe.matrix import Cell
from adaptrix_export.recipe.recipe import Recipe
from adaptrix_export.runtime.files import MANIFEST
from adaptrix_export.save.hashes import FileHash, InputHashes
from adaptrix_export.save.machine_paths import without_machine_paths

BUILT, THERE, FAILED = "built", "there already", "failed"
TRIES = 2  # of a build whose process died


@dataclass(frozen=True)
class Result:
    """What became of one build; `error` holds the error's parts, `worst` the largest difference
    of logits that its proof found."""

    label: str
    out: str
    state: str
    seconds: float = 0.0
    bytes: int = 0
    worst: float | None = None
    verdict: str = ""
    error: Mapping[str, str] | None = None
    exit_code: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# One build, by its label and its recipe as a document: runs in any process, raises nothing that a
# build can meet.
BuildOne = Callable[[str, Mapping[str, Any]], Result]


def check_apart(cells: Sequence[Cell]) -> None:
    """Raises RecipeError if two builds would be published at one place."""
    owners: dict[Path, str] = {}
    for cell in cells:
        out = Path(cell.recipe.out).absolute()
        name = cell.label or str(cell.recipe.out)
        if out in owners:
            raise RecipeError(
                f"out: {cell.recipe.out}", f"named by {owners[out]} and by {name}",
                "a folder of its own for each build",
            )  # fmt: skip
        owners[out] = name


def run_batch(cells: Sequence[Cell], build_one: BuildOne, jobs: int = 1) -> Iterator[Result]:
    """A result for each cell, as they come; with `jobs` above one from as many processes."""
    tasks = [(cell.label, cell.recipe.model_dump(mode="json")) for cell in cells]
    if jobs == 1:
        for label, document in tasks:
            yield build_one(label, document)
        return
    for turn in range(TRIES):
        # A process that dies takes its pool with it: what is left has another one, in the end each
        # build one by itself, so that a build that kills its process kills no other.
        groups = [tasks] if turn == 0 else [[task] for task in tasks]
        tasks = []
        for group in groups:
            yield from _in_processes(group, build_one, jobs if turn == 0 else 1, tasks)
    for label, document in tasks:
        error = CheckerError(label or str(document["out"]), "its process died", "a result")
        yield Result(
            label, str(document["out"]), FAILED, error=error.as_dict(), exit_code=error.exit_code
        )


def _in_processes(
    tasks: Iterable[tuple[str, dict[str, Any]]],
    build_one: BuildOne,
    jobs: int,
    lost: list[tuple[str, dict[str, Any]]],
) -> Iterator[Result]:
    # spawn: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures: dict[Future[Result], tuple[str, dict[str, Any]]] = {
            pool.submit(build_one, *task): task for task in tasks
        }
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def is_current(recipe: Recipe, plan: Plan, hasher: Callable[[Path], FileHash]) -> bool:
    """Whether the artifact at the recipe's place is what this recipe would make: same recipe, same
    versions, same inputs, and its files as they were written."""
    if not (recipe.out / MANIFEST).is_file():
        return False
    manifest = read_manifest(recipe.out)
    document = recipe.model_dump(mode="json", exclude={"out"})
    same = (
        manifest.tool.version == __version__
        and manifest.versions == library_versions()
        and manifest.recipe == without_machine_paths(document)
    )
    if not same:
        return False
    inputs = [
        (without_machine_paths(i.spec), i.file, i.hash.bytes, i.hash.sha256)
        for i in InputHashes(plan, hasher).result()
    ]
    known = [(i.spec, i.file, i.bytes, i.sha256) for i in manifest.inputs]
    return known == inputs and not check_hashes(recipe.out)
