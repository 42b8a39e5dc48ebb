"""The references, made from the code when the docs are built: a hook of mkdocs.

The command line comes from click, the recipe from its JSON Schema, the API from the names that the
public modules export. None of the three imports torch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

PACKAGE = Path(__file__).parents[1] / "adaptrix_export"
# Modules whose `__all__` is public.
PUBLIC = ("adaptrix_export", "adaptrix_export.runtime", "adaptrix_export.errors")


def on_config(config: Any) -> None:
    """Let pages include files of the repository, from wherever the docs are built."""
    config.mdx_configs["pymdownx.snippets"]["base_path"] = [str(PACKAGE.parent)]


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (an event of mkdocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def pages() -> dict[str, str]:
    """Markdown by the name of the page."""
    return {
        "cli": cli_page(),
        "recipe": recipe_page(),
        "manifest": document_page("manifest"),
        "report": document_page("report"),
        "api": api_page(),
        "map": map_page(),
    }


def cli_page() -> str:
    """Every command with its arguments, options and examples, as click knows them."""
    from adaptrix_export.cli import main

    parts = [
        "# Command line",
        "Made from the commands themselves. `adaptrix-export COMMAND --help` prints the same. "
        "Exit codes: 0 done; 1 a proof or a verification failed, nothing was published; 2 bad "
        "input or usage; 3 the machine failed (disk full, out of memory, a crash).",
    ]
    for name, command in sorted(main.commands.items()):
        parts += _command(name, command)
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"adaptrix-export {name}")
    yield f"## {name}"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    yield _escaped(re.sub(r"[ \n]*\n[ \n]*(?!\n)", " ", command.help or ""))
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            rows.append(f"| `{_cell(record[0])}` | {_cell(_escaped(record[1]))} |")
    if rows:
        yield "\n".join(["| option | meaning |", "|---|---|", *rows])
    epilog = (command.epilog or "").replace("\b\n", "")
    lines = [line.strip() for line in epilog.splitlines() if line.startswith("  ")]
    if lines:
        yield "```sh\n" + "\n".join(lines) + "\n```"


def recipe_page() -> str:
    """Every key of a recipe, a section for each section of it, from the JSON Schema."""
    from adaptrix_export.recipe import recipe_schema

    schema = recipe_schema()
    words = (
        "Made from the JSON Schema that `adaptrix-export schema` prints. Every key can be set on "
        "the command line, too: `--set parity.level=fast`. An unknown key, a key given twice or a "
        "YAML alias is an error. Relative paths are taken from the current working directory."
    )
    return _schema_page("Recipe", words, schema)


def document_page(name: str) -> str:
    """Every key of manifest.json or report.json, from the JSON Schema."""
    from adaptrix_export.package import documents

    kind = {"manifest": documents.ManifestDocument, "report": documents.ReportDocument}[name]
    words = f"Made from the JSON Schema that `adaptrix-export schema {name}` prints."
    schema = documents.document_schema(kind, f"{name}.json")
    return _schema_page(f"{name}.json", words, schema)


def _schema_page(title: str, words: str, schema: Mapping[str, Any]) -> str:
    parts = [f"# {title}", words, _table(schema, schema, "")]
    for key, prefix, section in _sections(schema, schema, ""):
        described = _escaped(section.get("description", "").partition("\n\n")[0])
        parts += [f"## {key}", described, _table(schema, section, prefix)]
    return "\n\n".join(part for part in parts if part) + "\n"


def keys(schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, description) of every key of a recipe."""
    found = [(key, value.get("description", "")) for key, value in schema["properties"].items()]
    for _, prefix, section in _sections(schema, schema, ""):
        found += [(prefix + k, v.get("description", "")) for k, v in section["properties"].items()]
    return found


def _sections(
    schema: Mapping[str, Any], part: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(dotted key, prefix of its keys, schema) of each mapping below `part`, depth first."""
    for key, value in part["properties"].items():
        for name in sorted(set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(value)))):
            section = schema["$defs"][name]
            if "properties" in section:
                yield prefix + key, f"{prefix}{key}.", section
                yield from _sections(schema, section, f"{prefix}{key}.")


def _table(schema: Mapping[str, Any], part: Mapping[str, Any], prefix: str) -> str:
    required = part.get("required", ())
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, value in part["properties"].items():
        default = "required" if key in required else _default(value)
        rows.append(
            f"| `{prefix}{key}` | {_cell(_values(schema, value))} | {_cell(default)} "
            f"| {_cell(_escaped(value.get('description', '')))} |"
        )
    return "\n".join(rows)


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict):
        return "see below"
    return "" if default is None else f"`{json.dumps(default)}`".replace('"', "")


def _values(schema: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """What a key may be, in words."""
    if "$ref" in value:
        return _values(schema, schema["$defs"][value["$ref"].rpartition("/")[2]])
    if "enum" in value:
        return " ".join(f"`{word}`" for word in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in value:
            kinds = [_values(schema, one) for one in value[several]]
            return ", ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    kind = value.get("type", "any value")
    if kind == "array":
        return f"list of {_values(schema, value['items'])}" if value.get("items") else "list"
    if kind == "object":
        return "keys and values"
    return str(kind)


def api_page() -> str:
    """The public names, each with its docstring, which mkdocstrings reads."""
    from importlib import import_module

    parts = ["# Python", "What can be imported and relied on."]
    for name in PUBLIC:
        parts.append(f"## {name}")
        module = import_module(name)
        names = getattr(module, "__all__", None) or _classes(module)
        parts += [f"::: {name}.{one}" for one in names if not one.startswith("__")]
    return "\n\n".join(parts) + "\n"


def _classes(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def map_page() -> str:
    """Every module of the package in the order of imports, with the first line of its docstring."""
    order = _order_of_imports()
    files = sorted(PACKAGE.rglob("*.py"), key=lambda f: (order.index(_home(f)), f.as_posix()))
    parts = [
        "# Map of the modules",
        "Every module, with the first line of its docstring; a folder may import what stands above "
        "it (`tests/test_imports.py`).",
    ]
    for home in dict.fromkeys(_home(file) for file in files):
        parts.append(f"## {home}")
        rows = ["| module | what it does |", "|---|---|"]
        for file in files:
            line = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split(
                "\n"
            )
            if _home(file) == home and line[0]:
                name = file.relative_to(PACKAGE).with_suffix("").as_posix()
                rows.append(f"| `{name.removesuffix('/__init__')}` | {_cell(_escaped(line[0]))} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _home(file: Path) -> str:
    """The folder or root module that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _order_of_imports() -> list[str]:
    """ORDER of tests/test_imports.py, which is the one place that says it."""
    tree = ast.parse((PACKAGE.parent / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            text = ast.literal_eval(node.value.func.value)  # type: ignore[attr-defined]
            return [*text.split(), "__init__", "__main__"]
    raise ValueError("tests/test_imports.py has no ORDER")


def _escaped(text: str) -> str:
    """Plain text as Markdown: what would be HTML or emphasis stays as it is."""
    pieces = re.split(r"(`[^`]*`)", text)
    plain = (re.sub(r"([<>*_\[\]])", r"\\\1", piece) for piece in pieces[::2])
    return "".join(a + b for a, b in zip(plain, [*pieces[1::2], ""], strict=True))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
