"""Command `push`: an artifact to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Send an artifact to the hub.",
    epilog=examples(
        "push build/smollm2-pydoc org/name",
        "push build/smollm2-pydoc org/name --private --revision int4",
        "push build/smollm2-pydoc org/name --pull-request",
        "push build/smollm2-pydoc org/name --card-only",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--revision", metavar="BRANCH", help="A branch, made if it is not there.")
@click.option("--pull-request", is_flag=True, help="Propose it instead of committing it.")
@click.option("--private", is_flag=True, help="Make the repository private if it is new.")
@click.option("--license", "licence", metavar="ID", help="For the card, such as apache-2.0.")
@click.option("--card-only", is_flag=True, help="Print the model card and send nothing.")
@shared_options
def push(
    artifact: Path,
    repo: str,
    revision: str | None,
    pull_request: bool,
    private: bool,
    licence: str | None,
    card_only: bool,
    as_json: bool,
) -> None:
    """Send ARTIFACT and a model card to the hub, in one commit.

    Its hashes are checked first. What the hub has already is not sent again.
    """
    from adaptrix_export.manage.hub import push as send
    from adaptrix_export.show.card import model_card
    from adaptrix_export.show.facts import read_facts
    from adaptrix_export.show.terminal import progress

    card = model_card(read_facts(artifact), repo, licence)
    if card_only:
        click.echo(card, nl=False)
        return
    with progress() as telling:
        sent = send(artifact, repo, card, revision, pull_request, private, telling)
    if as_json:
        failures.print_json({"repo": sent.repo, "url": sent.url, "files": sent.files})
        return
    click.echo(f"pushed {sent.files} files: {sent.url}")
