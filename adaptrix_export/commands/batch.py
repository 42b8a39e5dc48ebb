"""Command `batch`: every build of several recipes and their matrices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures

if TYPE_CHECKING:
    from adaptrix_export.manage.batch import Result


@click.command(
    short_help="Build many artifacts.",
    epilog=examples(
        "batch recipes/matrix.yaml",
        "batch a.yaml b.yaml --jobs 4 --page build/compared.html",
        "batch matrix.yaml --set parity.level=fast --dry-run",
    ),
)
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="For every build.")
@click.option("--page", type=click.Path(path_type=Path), help="Compare the artifacts on a page.")
@click.option("--dry-run", is_flag=True, help="Only list what would be built.")
@shared_options
def batch(
    recipes: tuple[Path, ...],
    jobs: int,
    settings: tuple[str, ...],
    page: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build every RECIPE, and every combination of one that has a `matrix`.

    All recipes are checked before the first build. A build that fails does not stop the others;
    the exit code is that of the first one that failed. What is there already, of the same recipe,
    inputs and versions, is not built again.
    """
    from adaptrix_export.manage.batch import check_apart, run_batch
    from adaptrix_export.recipe import read_document
    from adaptrix_export.recipe.matrix import cells

    builds = [c for path in recipes for c in cells(read_document(path), str(path), settings)]
    check_apart(builds)
    if dry_run:
        listed = [{"label": c.label, "out": str(c.recipe.out)} for c in builds]
        if as_json:
            failures.print_json({"builds": listed})
        else:
            for entry in listed:
                click.echo(entry["out"])
        return
    results: list[Result] = []
    for result in run_batch(builds, build_cell, jobs):
        results.append(result)
        click.echo(f"[{len(results)}/{len(builds)}] {result.out}: {result.state}", err=True)
    order = {str(cell.recipe.out): place for place, cell in enumerate(builds)}
    results.sort(key=lambda result: order[result.out])
    _show(results, as_json)
    if page is not None:
        _compare(results, page, as_json)
    failed = [result for result in results if result.error is not None]
    if failed:
        click.get_current_context().exit(failed[0].exit_code)


def build_cell(label: str, document: Mapping[str, Any]) -> Result:
    """One build, in whatever process this is; what is shared is kept from build to build."""
    from adaptrix_export import pipeline
    from adaptrix_export.errors import known
    from adaptrix_export.manage.batch import BUILT, FAILED, THERE, Result, is_current
    from adaptrix_export.package import read_manifest
    from adaptrix_export.recipe import Recipe

    recipe = Recipe.model_validate(document)
    start = time.monotonic()
    try:
        state = THERE
        if not is_current(recipe, pipeline.open_plan(recipe), _remembered):
            state = BUILT
            pipeline.build(recipe, hasher=_remembered)
        manifest = read_manifest(recipe.out)
    except Exception as error:
        failure = known(error)
        if failure is None:
            raise  # a fault of ours
        return Result(
            label, str(recipe.out), FAILED, time.monotonic() - start,
            error=failure.as_dict(), exit_code=failure.exit_code,
        )  # fmt: skip
    return Result(
        label, str(recipe.out), state, time.monotonic() - start,
        sum(file.bytes for file in manifest.outputs.values()),
        _worst(recipe.out), manifest.parity.verdict,
    )  # fmt: skip


def _worst(out: Path) -> float | None:
    """The largest difference of logits in an artifact's report."""
    import json

    from adaptrix_export.package.documents import ReportDocument, parse_document

    path = out / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    cases = parse_document(ReportDocument, report, str(path)).cases
    return max((case.max_abs for case in cases if case.max_abs is not None), default=None)


def _remembered(path: Path) -> Any:
    """The hash of a file that many builds read, taken once as long as the file is the same."""
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@cache
def _hashed(path: Path, *identity: int) -> Any:
    from adaptrix_export.package import hash_file

    return hash_file(path)


def _show(results: Iterable[Result], as_json: bool) -> None:
    from adaptrix_export.show.batch_table import batch_table
    from adaptrix_export.show.terminal import show

    if as_json:
        failures.print_json({"builds": [result.as_dict() for result in results]})
    else:
        show(batch_table(list(results)))


def _compare(results: Iterable[Result], page: Path, as_json: bool) -> None:
    from adaptrix_export.show.compare import compared
    from adaptrix_export.show.facts import read_facts
    from adaptrix_export.show.page import compare_page
    from adaptrix_export.show.write import write_page

    facts = [read_facts(Path(result.out)) for result in results if result.error is None]
    if len(facts) < 2:
        click.echo("note: no page: it takes two artifacts to compare", err=True)
        return
    text = compare_page([f.name for f in facts], compared(facts), facts)
    click.echo(str(write_page(text, page)), err=as_json)
