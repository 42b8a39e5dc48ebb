"""README, docs and recipes name only commands, options, keys, targets and names that exist.

Every fenced block says what it is. Blocks are read after the pages' includes, as they are shown.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import click
import pytest
import yaml

from adaptrix_export.cli import main
from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe import load_recipe, make_recipe, recipe_schema
from adaptrix_export.recipe.matrix import MATRIX, cells

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LANGUAGES = {"sh", "python", "yaml", "text", "diff", "json", "js"}
# What a recipe needs beside the section that a block shows.
REST = {"base": "./base", "adapters": ["./lora"], "target": "onnx", "out": "./out"}


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path, text: str) -> list[Block]:
    """The fenced blocks of Markdown text, their includes read."""
    found: list[Block] = []
    lines, start = text.splitlines(), None
    for number, line in enumerate(lines, 1):
        fence = re.fullmatch(r" *```(.*)", line)
        if fence and start is None:
            start, language = number, fence[1].strip()
        elif fence and start is not None:
            body = "\n".join(lines[start : number - 1])
            body = re.sub(r'--8<-- "(.+)"', lambda m: (ROOT / m[1]).read_text("utf-8"), body)
            found.append(Block(document, start, language, body))
            start = None
    assert start is None, f"{document}: the block at line {start} has no end"
    return found


def every_block(language: str | None = None) -> list[Block]:
    blocks = [b for d in DOCUMENTS for b in blocks_of(d, d.read_text(encoding="utf-8"))]
    return [b for b in blocks if language in (None, b.language)]


def commands_in(block: Block) -> list[list[str]]:
    """The words of each command, continued lines joined, without what `|` or `>` leads to."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [shlex.split(line, comments=True) for line in lines if line and line[0] != "#"]


def check_adaptrix(words: list[str]) -> None:
    """Raise click's error for a command or option that does not exist; nothing is run."""
    words = list(takewhile(lambda word: word not in (">", ">>"), words))
    name, *rest = words
    if name in ("--help", "-h", "--version"):
        return
    command = main.get_command(click.Context(main), name)
    if command is None:
        raise click.UsageError(f"no command {name}")
    if "--help" not in rest:
        command.make_context(name, rest, resilient_parsing=False)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def extras() -> set[str]:
    """The optional parts that pip can be asked for."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    part = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([a-z]+) = \[", part, re.M))


def made_by_examples() -> set[str]:
    """The files that the diffs of the pages in `extend` bring."""
    diffs = (ROOT / "docs" / "examples").glob("*.diff")
    return {name for diff in diffs
            for name in re.findall(r"^\+\+\+ b/(\S+)", diff.read_text("utf-8"), re.M)}  # fmt: skip


def check_command(words: list[str]) -> None:
    """Raise ValueError or click's error for a command line that cannot be right."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "adaptrix-export":
        check_adaptrix(rest)
    elif program == "make":
        wrong = [w for w in rest if "=" not in w and w not in make_targets()]
        if wrong:
            raise ValueError(f"no make target {wrong}")
    elif program == "pip":
        named = [e for w in rest for e in re.findall(r"\[([\w,-]+)\]", w)]
        wrong = [e for e in ",".join(named).split(",") if e and e not in extras()]
        if wrong:
            raise ValueError(f"no extra {wrong}")
    elif program in ("pytest", "python"):
        paths = [w for w in rest if w.endswith(".py")]
        modules = [w for w in rest if w.startswith(("tests.", "adaptrix_export"))]
        paths += [m.replace(".", "/") + ".py" for m in modules]
        missing = [p for p in paths if not (ROOT / p).exists() and p not in made_by_examples()]
        if missing:
            raise ValueError(f"no {missing}")
    elif program not in ("git", "cd", "bash", "source", "openssl"):
        raise ValueError(f"unknown program {program}")


def check_python(block: Block) -> None:
    """Compiles, and what it imports from the package, with what it calls on it, exists."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adaptrix_export"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                known = hasattr(module, "_HOMES") and alias.name in module._HOMES
                assert known or hasattr(module, alias.name), f"{block}: {alias.name}"
    if "Session" in block.text:
        from adaptrix_export.runtime import Session

        for name in re.findall(r"\bsession\.(\w+)\(", block.text):
            assert hasattr(Session, name), f"{block}: Session.{name}"


def check_yaml(block: Block) -> None:
    """A recipe, or a section of one."""
    document = yaml.safe_load(block.text)
    if "adapter" in document:
        document["adapters"] = [document.pop("adapter")]
    whole = {**REST, **document}
    method = document.get("compose", {})
    if isinstance(method, dict) and "calibration" in method:
        whole["adapters"] = sorted(method["calibration"])
    if MATRIX in whole:
        assert len(cells(whole, str(block))) > 1
        return
    make_recipe(whole, str(block))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_every_block_says_what_it_is(document):
    wrong = [b for b in blocks_of(document, document.read_text("utf-8"))
             if b.language not in LANGUAGES]  # fmt: skip
    assert [str(b) for b in wrong] == []
    indented = re.search(
        r"(?:\A|\n\n) {4}(?:adaptrix-export|make|pip) ", document.read_text("utf-8")
    )
    assert indented is None, "a command outside a fenced block"


def test_commands_exist_with_their_options():
    seen: Counter[str] = Counter()
    for block in every_block("sh"):
        for words in commands_in(block):
            try:
                check_command(words)
            except (click.ClickException, ValueError) as error:
                pytest.fail(f"{block}: {' '.join(words)}: {error}")
            seen[" ".join(words[:2]) if words[0] == "adaptrix-export" else words[0]] += 1
    commands = {f"adaptrix-export {name}" for name in main.commands}
    assert commands - set(seen) == set(), "commands that no page shows"
    assert sum(seen.values()) >= 40, seen


def test_python_blocks_import_what_exists():
    blocks = every_block("python")
    for block in blocks:
        check_python(block)
    assert len(blocks) >= 5


def test_yaml_blocks_are_recipes():
    blocks = every_block("yaml")
    for block in blocks:
        try:
            check_yaml(block)
        except RecipeError as error:
            pytest.fail(f"{block}: {error}")
    assert len(blocks) >= 12


@pytest.mark.parametrize(
    "words",
    [
        "adaptrix-export build --no-such-option", "adaptrix-export no-such-command",
        "make no-such-target", "pip install '.[no-such-extra]'", "pytest tests/no_such_file.py",
        "frobnicate",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(words):
    """Negative control."""
    with pytest.raises((click.ClickException, ValueError)):
        check_command(shlex.split(words))


def test_a_wrong_block_is_noticed():
    """Negative control."""
    with pytest.raises(RecipeError, match="no_such_key"):
        check_yaml(Block(ROOT / "README.md", 1, "yaml", "no_such_key: 1"))
    with pytest.raises(AssertionError, match="Sessoin"):
        check_python(
            Block(ROOT / "README.md", 1, "python", "from adaptrix_export.runtime import Sessoin")
        )


def references():
    """docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_references_have_every_command_option_and_key():
    made = references()
    pages = made.pages()
    for name, command in main.commands.items():
        section = pages["cli"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        assert [o for o in options if f"{o}" not in section] == [], name
    keys = made.keys(recipe_schema())
    assert len(keys) >= 50
    assert [key for key, _ in keys if f"| `{key}` |" not in pages["recipe"]] == []
    assert [key for key, text in keys if not text] == [], "keys without a description"


def test_every_page_is_in_the_table_of_contents():
    listed = (ROOT / "docs" / "mkdocs.yml").read_text("utf-8")
    pages = [page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md")]
    assert [page for page in pages if page not in listed] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_adapters_are_here(path):
    recipe = load_recipe(path)
    for adapter in recipe.adapters:
        assert (ROOT / adapter.source / "adapter_model.safetensors").is_file()
    shown = [page for page in PAGES.rglob("*.md") if f"recipes/{path.name}" in page.read_text()]
    assert shown, "no page shows it"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds(tmp_path, monkeypatch, path):
    from adaptrix_export import build

    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path, [f"out={tmp_path / 'out'}"])
    outcome = build(recipe)
    assert outcome.report is not None and outcome.report["passed"]
