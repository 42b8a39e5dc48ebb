"""Command `verify`: a published artifact checked again."""

from __future__ import annotations

from pathlib import Path

import click

from adaptrix_export.commands.options import examples, shared_options
from adaptrix_export.show import failures


@click.command(
    short_help="Check a published artifact.",
    epilog=examples("verify build/smollm2-pydoc", "verify build/smollm2-pydoc --json"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", metavar="SOURCE", help="Where the base is now, if it was moved.")
@click.option("--adapter", "adapters", multiple=True, metavar="SOURCE", help="The same; repeat it.")
@click.option(
    "--require-parity", is_flag=True, help="Fail unless parity is proved again, here and now."
)
@click.option(
    "--key", metavar="FILE", type=click.Path(path_type=Path),
    help="A public key: the artifact must be signed by its owner.",
)  # fmt: skip
@click.option(
    "--signature", metavar="FILE", type=click.Path(path_type=Path),
    help="The signature; by default ARTIFACT.sig.",
)  # fmt: skip
@shared_options
def verify(
    artifact: Path, base: str | None, adapters: tuple[str, ...], require_parity: bool,
    key: Path | None, signature: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Check a published ARTIFACT: its hashes, and parity when base and adapters are at hand.

    With --key its signature comes first: nothing of an artifact is believed before that.
    """
    from adaptrix_export.errors import VerificationError
    from adaptrix_export.manage.verify_artifact import HASHES_ONLY, REPROVED, verify_artifact
    from adaptrix_export.show.terminal import progress

    if signature is not None and key is None:
        raise click.UsageError("--signature needs --key")
    signed = None
    if key is not None:
        from adaptrix_export.manage.sign import check_signature

        signed = check_signature(artifact, key, signature)
    with progress() as telling:
        result = verify_artifact(artifact, telling, base, adapters)
    proof = result["proof"]
    if require_parity and proof != REPROVED:
        raise VerificationError(
            str(artifact), f"{proof} ({result['note']})", REPROVED,
            "name the originals with --base and --adapter",
        )  # fmt: skip
    if as_json:
        failures.print_json({**result, "signature": str(signed) if signed else None})
        return
    if result["parity"] is not None:
        failures.print_table(result["parity"])
    if result["note"]:
        click.echo(f"note: {result['note']}")
    if signed is not None:
        click.echo(f"signed by the owner of {key}: {signed}")
    files = f"{artifact}, {result['files']} files"
    if proof == REPROVED:
        click.echo(f"verified {files}: hashes, and parity proved again")
    elif proof == HASHES_ONLY:
        click.echo(f"unchanged {files}: hashes only; parity was proved when it was built")
    else:
        click.echo(f"UNVERIFIED {files}: hashes only; parity was never proved")
