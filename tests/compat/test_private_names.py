"""Private and patched names of other libraries are in `compat/`, with versions and reasons."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adaptrix_export"
COMPAT = PACKAGE / "compat"
OWN = "adaptrix_export"
# Documented, whatever they begin with: of named tuples, and of `os`.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit"}
ACCESSORS = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_foreign(module: str) -> bool:
    top = module.partition(".")[0]
    return top != OWN and top not in sys.stdlib_module_names


def names_made_in(nodes: list[ast.AST]) -> set[str]:
    """Functions, classes, fields and attributes of its own objects that a module defines."""
    made = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and is_own_object(node.value)
        ):
            made.add(node.attr)
    return made


def is_own_object(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names(nodes: list[ast.AST]) -> dict[str, str]:
    """What a module calls the foreign modules that it imports: local name -> module."""
    return {
        alias.asname or alias.name.partition(".")[0]: alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if is_foreign(alias.name)
    }


def imported_privately(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return
    for name in names:
        private = any(is_private(part) for part in name.split("."))
        if name.startswith("unittest.mock") or (private and is_foreign(name)):
            yield name


def read_privately(node: ast.AST, here: set[str], everywhere: set[str]) -> Iterator[str]:
    """`x._name` and `getattr(x, "_name")`, where the name is not one of ours."""
    if isinstance(node, ast.Attribute):
        name, own = node.attr, everywhere if is_own_object(node.value) else here
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ACCESSORS
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ):
        name, own = str(node.args[1].value), here
    else:
        return
    if is_private(name) and name not in DOCUMENTED and name not in own:
        yield name


def patched(node: ast.AST, modules: dict[str, str]) -> Iterator[str]:
    """Assignments to an attribute of a foreign module, however deep."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        targets = node.args[:1] if node.func.id == "setattr" else []
    for target in targets:
        root = target
        while isinstance(root, ast.Attribute):
            root = root.value
        is_module = isinstance(root, ast.Name) and root.id in modules
        if is_module and (root is not target or isinstance(node, ast.Call)):
            yield f"patch of {ast.unparse(target)}"


def private_uses(root: Path) -> list[str]:
    """Every use of a private or patched foreign name under `root`, `compat/` left out."""
    nodes = {
        path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for path in root.rglob("*.py")
    }
    made = {path: names_made_in(own) for path, own in nodes.items()}
    everywhere = set().union(*made.values())
    uses = []
    for path, own in nodes.items():
        place = path.relative_to(root).as_posix()
        if place.startswith("compat/"):
            continue
        modules = foreign_names(own)
        for node in own:
            names = [
                *imported_privately(node),
                *read_privately(node, made[path], everywhere),
                *patched(node, modules),
            ]
            uses += [f"{place}:{getattr(node, 'lineno', 0)}: {name}" for name in names]
    return sorted(uses)


def test_no_private_name_of_a_library_is_used_outside_compat():
    assert private_uses(PACKAGE) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch\nx = torch.nn.Linear(1, 1)._parameters", "_parameters"),
        ("from torch._subclasses import fake_tensor", "torch._subclasses"),
        ("from mobius.resolver import _config_from_hf", "mobius.resolver._config_from_hf"),
        ("import onnxscript.rewriter._matcher", "onnxscript.rewriter._matcher"),
        ("from unittest.mock import patch", "unittest.mock"),
        ("def f(config): return getattr(config, '_attn_implementation')", "_attn_implementation"),
        ("def f(config): config._attn_implementation = 'eager'", "_attn_implementation"),
        ("class A:\n    def f(self): return self._buffers", "_buffers"),
        ("import transformers\ntransformers.masking_utils.f = None", "transformers.masking_utils"),
        ("import peft\nsetattr(peft.tuners, 'x', 1)", "patch of peft.tuners"),
    ],
)
def test_a_private_name_outside_compat_is_noticed(tmp_path, line, name):
    """Negative control; the same lines inside compat are where they belong."""
    for folder in ("arch", "compat"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(line + "\n")
    uses = private_uses(tmp_path)
    assert uses and all(use.startswith("arch/module.py:") for use in uses)
    assert any(name in use for use in uses)


def test_names_of_our_own_are_no_private_names_of_others(tmp_path):
    (tmp_path / "module.py").write_text(
        "class A:\n    def __init__(self): self._x = 1\n    def f(self, other): return other._x\n"
        "def _own(): return A().f(A())\nvalue = _own()\npair = (1, 2)._replace\n"
    )
    assert private_uses(tmp_path) == []


def entries() -> list[tuple[str, str, str]]:
    """(module, function, docstring) of every entry of `compat/`."""
    return [
        (path.name, node.name, ast.get_docstring(node) or "")
        for path in sorted(COMPAT.glob("*.py"))
        if path.name != "ranges.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def test_every_entry_says_where_it_was_seen_and_what_breaks_without_it():
    assert len(entries()) > 20
    for module, function, docstring in entries():
        said = " ".join(docstring.split())
        assert "Seen in " in said and "Without it" in said, f"compat/{module}: {function}"
