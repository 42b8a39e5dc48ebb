"""Command `sign`: a signature beside an artifact."""

from __future__ import annotations

import os
from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Sign a published artifact.",
    epilog=examples(
        "sign build/smollm2-pydoc --key key.pem",
        "sign build/smollm2-pydoc --key key.pem --signature release/smollm2-pydoc.sig",
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, metavar="FILE", type=click.Path(path_type=Path),
    help="A private elliptic curve key, PEM.",
)  # fmt: skip
@click.option(
    "--signature", metavar="FILE", type=click.Path(path_type=Path),
    help="Where to write it; by default ARTIFACT.sig.",
)  # fmt: skip
@click.option(
    "--password-env", metavar="NAME", help="The environment variable with the key's password."
)
@shared_options
def sign(
    artifact: Path, key: Path, signature: Path | None, password_env: str | None, as_json: bool
) -> None:
    """Sign every file of ARTIFACT by its hash, with an offline key.

    `verify --key` checks it, and so does `model_signing verify key`, the library's own command.
    Whoever changes the artifact, with add-adapter too, signs it again.
    """
    from adaptrix_export.manage.sign import sign_artifact

    password = None
    if password_env is not None:
        password = os.environ.get(password_env)
        if password is None:
            raise click.UsageError(f"there is no environment variable {password_env}")
    place = sign_artifact(artifact, key, signature, password)
    if as_json:
        failures.print_json({"artifact": str(artifact), "signature": str(place)})
        return
    click.echo(f"signed {artifact}: {place}")
