"""The house: every folder imports only what stands before it, and no imports go in a circle.

Lazy imports inside functions count; imports for type checking alone do not.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "adaptrix_export"
# The order of compilation. A module or folder may import what is named before it.
ORDER = (
    "errors progress compat runtime plan arch recipe load merge save graph precision oracle "
    "measure passes targets package prove manage show pipeline commands cli"
).split()
LOOSE = {"__init__", "__main__", "cli", "pipeline", "errors", "progress"}


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package in `root`."""
    found = {}
    for path in (root / PACKAGE).rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that one imports, lazily or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    wanted = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            wanted += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
    found = set()
    for dotted in wanted:
        while dotted and dotted not in known:
            dotted = dotted.rpartition(".")[0]
        if dotted and dotted not in (PACKAGE, name):
            found.add(dotted)
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    known = modules_of(root)
    return {name: imports_of(name, path, set(known)) for name, path in known.items()}


def home_of(module: str) -> str:
    return module.split(".")[1]


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what stands later in the order."""
    return sorted(
        f"{one} imports {other}"
        for one, others in graph.items()
        if one not in (PACKAGE, f"{PACKAGE}.__main__")
        for other in others
        if ORDER.index(home_of(other)) > ORDER.index(home_of(one))
    )


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can reach themselves."""
    found = []
    for start in graph:
        seen: set[str] = set()
        open_ = list(graph[start])
        while open_:
            name = open_.pop()
            if name not in seen:
                seen.add(name)
                open_ += graph[name]
        if start in seen:
            found.append(start)
    return sorted(found)


@pytest.fixture(scope="module")
def graph():
    return graph_of(ROOT)


def test_every_folder_has_its_place_in_the_order(graph):
    homes = {home_of(name) for name in graph if name != PACKAGE}
    assert homes - {"__main__"} <= set(ORDER)


def test_folders_import_only_what_stands_before_them(graph):
    assert violations(graph) == []


def test_no_imports_go_in_a_circle(graph):
    assert circles(graph) == []


def test_the_runtime_knows_nothing_of_the_compiler(graph):
    reached = {name for one in graph if home_of_runtime(one) for name in graph[one]}
    assert {name for name in reached if not home_of_runtime(name)} <= {f"{PACKAGE}.errors"}


def home_of_runtime(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.runtime")


def test_the_root_holds_four_modules():
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == LOOSE


def test_a_wrong_import_is_noticed(tmp_path):
    """Negative control: a lazy import backwards, and a circle through it."""
    for folder in ("plan", "graph"):
        (tmp_path / PACKAGE / folder).mkdir(parents=True)
        (tmp_path / PACKAGE / folder / "__init__.py").touch()
    (tmp_path / PACKAGE / "__init__.py").touch()
    (tmp_path / PACKAGE / "plan" / "site.py").write_text(
        f"def late():\n    from {PACKAGE}.graph.node import Node\n    return Node\n"
    )
    (tmp_path / PACKAGE / "graph" / "node.py").write_text(
        f"from {PACKAGE}.plan.site import late\n\nNode = late\n"
    )
    found = graph_of(tmp_path)
    wrong = f"{PACKAGE}.plan.site imports {PACKAGE}.graph.node"
    assert violations(found) == [wrong]
    assert circles(found) == [f"{PACKAGE}.graph.node", f"{PACKAGE}.plan.site"]
