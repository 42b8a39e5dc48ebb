"""Command `add-adapter`: more adapters for a switchable artifact."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    "add-adapter",
    short_help="Add adapters to a switchable artifact.",
    epilog=examples(
        "add-adapter build/switchable ./third-lora",
        "add-adapter build/switchable ./third-lora --name sql --base ./base",
        "add-adapter build/switchable ./loras/*",
        "add-adapter build/switchable --from adapters.txt --parity fast",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option(
    "--from",
    "listed",
    metavar="LIST",
    type=click.Path(path_type=Path),
    help="A text file that names more adapters, one a line.",
)
@click.option("--name", metavar="NAME", help="What to call it; by default its folder's name.")
@click.option("--base", metavar="SOURCE", help="Where the base is now, if it was moved.")
@click.option(
    "--parity", "level", default="full", show_default=True,
    type=click.Choice(["full", "fast", "off"]), help="How much to prove before it is added.",
)  # fmt: skip
@shared_options
def add_adapter(
    artifact: Path,
    adapters: tuple[str, ...],
    listed: Path | None,
    name: str | None,
    base: str | None,
    level: str,
    as_json: bool,
) -> None:
    """Add ADAPTERs to ARTIFACT, a folder of target onnx-switchable, without building it again.

    Each is compared with its own PyTorch + PEFT model through the artifact's graph first. Of
    several, one that is wrong is named and left out, and the rest are added; the exit code is that
    of the first one left out.
    """
    from adaptrix_export.manage.add_adapters import read_list

    sources = [*adapters, *(read_list(listed) if listed else ())]
    if not sources:
        raise click.UsageError("name an adapter, or a list of them with --from")
    if len(sources) == 1 and listed is None:
        _add_one(artifact, sources[0], name, base, level, as_json)
        return
    if name is not None:
        raise click.UsageError("--name is for one adapter; several are named after their sources")
    _add_several(artifact, sources, base, level, as_json)


def _add_one(
    artifact: Path, source: str, name: str | None, base: str | None, level: str, as_json: bool
) -> None:
    from adaptrix_export.manage.add_adapter import add_adapter as add
    from adaptrix_export.show.terminal import progress
    from adaptrix_export.show.write import renew_page

    with progress() as telling:
        added = add(artifact, source, name, base, level, telling, renew_page)
    if as_json:
        document = {"name": added.name, "file": str(added.file), "report": added.report}
        failures.print_json({**document, "entry": added.entry})
        return
    if added.report is None:
        click.echo("UNVERIFIED: parity was off; the manifest says so, too")
    else:
        failures.print_table(added.report)
    click.echo(f"added {added.name}: {added.file}")


def _add_several(
    artifact: Path, sources: list[str], base: str | None, level: str, as_json: bool
) -> None:
    from adaptrix_export.manage.add_adapters import add_adapters
    from adaptrix_export.package.documents import ReportDocument
    from adaptrix_export.prove.report import summary
    from adaptrix_export.show.terminal import progress
    from adaptrix_export.show.write import renew_page

    with progress() as telling:
        outcome = add_adapters(artifact, sources, base, level, telling, renew_page)
    if as_json:
        failures.print_json({
            "added": [
                {"name": a.name, "file": str(a.file), "report": a.report} for a in outcome.added
            ],
            "left_out": [
                {"name": left.name, "source": left.source, **left.error.as_dict()}
                for left in outcome.left_out
            ],
        })  # fmt: skip
    else:
        for added in outcome.added:
            how = (
                summary(ReportDocument.of(added.report))
                if added.report
                else "UNVERIFIED: parity was off"
            )
            click.echo(f"added {added.name}: {how}")
        for left in outcome.left_out:
            click.echo(f"left out {left.name}: {left.error}", err=True)
        click.echo(f"{len(outcome.added)} of {len(sources)} adapters added to {artifact}")
    if outcome.left_out:
        click.get_current_context().exit(outcome.left_out[0].error.exit_code)
