"""Our folders in the tools that people have, each in an environment of its own: `make clients`.

    python -m tests.tools.clients [--only NAME,NAME] [--home FOLDER] [--json FILE] [--table FILE.md]

The artifacts are built once, with no option for any client; what each client must answer comes from
PyTorch + PEFT (`tests/client/artifacts.py`). A row that fails says what the client said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import clients, npm

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
LIMIT_S = 1200
# Environments: what is installed, one by one; None is the one that this runs in.
ENVIRONMENTS: dict[str, tuple[str, ...] | None] = {
    "own": None,
    "oldest": ("numpy<2", "onnxruntime==1.20.*"),
    # Optimum is behind the ONNX backend of sentence-transformers, and wants transformers 4
    "optimum": (TORCH, "sentence-transformers[onnx]==5.7.0"),
    "fastembed": ("fastembed",),
}
NODE = "node"


@dataclass(frozen=True)
class Client:
    """One row: whose tool does what, by which script of tests/client, with what installed."""

    name: str
    task: str
    environment: str
    script: str
    row: str
    packages: tuple[str, ...]


ROWS = (
    Client("ONNX Runtime, newest", "decoder", "own", "onnx", "plain", ("onnxruntime",)),
    Client("ONNX Runtime, oldest", "decoder", "oldest", "onnx", "plain", ("onnxruntime",)),
    Client("ONNX Runtime", ".onnx_adapter", "own", "onnx", "adapters", ("onnxruntime",)),
    Client("onnxruntime-genai", "decoder", "own", "genai", "decoder", ("onnxruntime-genai",)),
    Client("onnxruntime-genai", "Adapters", "own", "genai", "adapters", ("onnxruntime-genai",)),
    Client("Optimum", "causal", "optimum", "optimum_models", "causal", ("optimum-onnx",)),
    Client("Optimum", "padded batch", "optimum", "optimum_models", "batch", ("optimum-onnx",)),
    Client("Optimum", "features", "optimum", "optimum_models", "features", ("optimum-onnx",)),
    Client("Optimum", "classifier", "optimum", "optimum_models", "classifier", ("optimum-onnx",)),
    Client("Optimum", "seq2seq, beams", "optimum", "optimum_models", "seq2seq", ("optimum-onnx",)),
    Client("Optimum", "images", "optimum", "optimum_models", "image", ("optimum-onnx",)),
    Client("Sentence Transformers", "encode", "optimum", "sentences", "encode",
           ("sentence-transformers",)),
    Client("Sentence Transformers", "optimize, O2", "optimum", "sentences", "optimized",
           ("sentence-transformers",)),
    Client("Sentence Transformers", "quantize, int8", "optimum", "sentences", "quantized",
           ("sentence-transformers",)),
    Client("fastembed", "encode", "fastembed", "sentences", "fastembed", ("fastembed",)),
    Client("transformers 5", "checkpoint", "own", "torch_libraries", "checkpoint",
           ("transformers",)),
    Client("transformers 4", "checkpoint", "optimum", "torch_libraries", "checkpoint",
           ("transformers",)),
    Client("PEFT", "adapter", "own", "torch_libraries", "adapter", ("peft",)),
    Client("ONNX Runtime's float16 converter", "next step", "own", "onnx", "float16",
           ("onnxruntime",)),
    Client("MatMulNBitsQuantizer", "next step", "own", "onnx", "nbits", ("onnxruntime",)),
    Client("quantize_dynamic", "next step", "own", "onnx", "dynamic", ("onnxruntime",)),
    *(
        Client("transformers.js", task, NODE, "transformers", row, ("@huggingface/transformers",))
        for task, row in (
            ("decoder", "causal"), ("padded batch", "batch"), ("chat template", "chat"),
            ("features", "features"), ("classifier", "classifier"), ("seq2seq", "seq2seq"),
            ("images", "image"),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    client: str
    task: str
    versions: str
    passed: bool
    detail: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="environments, with commas between them")
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "clients" / "artifacts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="a page of docs to write the table into")
    given = parser.parse_args(arguments)
    home = given.home.absolute()
    names = [n for n in given.only.split(",") if n] or [*ENVIRONMENTS, NODE]
    subprocess.run(
        [sys.executable, "-m", "tests.client.artifacts", str(home)], cwd=ROOT, check=True
    )
    answers = []
    for answer in (answer for name in names for answer in asked(name, home)):
        answers.append(answer)
        mark = "passed" if answer.passed else "FAILED"
        print(f"{answer.client:34} {answer.task:16} {mark}  {answer.detail}", flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(answer) for answer in answers], indent=1))
    if given.table:
        given.table.write_text(page(answers), encoding="utf-8")
    passed = sum(answer.passed for answer in answers)
    print(f"{passed} of {len(answers)}")
    return 0 if answers and passed == len(answers) else 1


def asked(name: str, home: Path) -> Iterator[Answer]:
    """The answers of all clients of one environment, each row in a process of its own."""
    rows = [row for row in ROWS if row.environment == name]
    if name == NODE:
        modules = npm.modules("@huggingface/transformers")
        script = [str(ROOT / "tests" / "client" / "transformers.mjs"), str(home), str(modules)]
        for row in rows:
            yield answered(row, ["node", *script, row.row], npm_versions(modules, row.packages))
        return
    packages = ENVIRONMENTS[name]
    python = Path(sys.executable) if packages is None else clients.environment(name, *packages)
    for row in rows:
        command = [str(python), "-m", f"tests.client.{row.script}", str(home), row.row]
        yield answered(row, command, pip_versions(python, row.packages))


def answered(row: Client, command: list[str], versions: str) -> Answer:
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"row"')]
    if not lines:
        said = " ".join(done.stderr.split())[-300:]
        return Answer(row.name, row.task, versions, False, f"exit {done.returncode}: {said}")
    answer = json.loads(lines[-1])
    return Answer(row.name, row.task, versions, answer["passed"], answer["detail"])


def pip_versions(python: Path, packages: Sequence[str]) -> str:
    code = f"from tests.client.rows import versions; print(*versions(*{packages!r}).values())"
    done = subprocess.run(
        [python, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def npm_versions(modules: Path, packages: Sequence[str]) -> str:
    files = (modules / "node_modules" / name / "package.json" for name in packages)
    return " ".join(json.loads(file.read_text())["version"] for file in files)


def page(answers: Sequence[Answer]) -> str:
    """The table of docs/pages/measured/clients.md."""
    passed = sum(answer.passed for answer in answers)
    lines = [
        "# Clients", "",
        "What `make clients` said: tiny models of each kind, and a real sentence encoder, built",
        "with no option for any client, each then asked in the client's own environment. Tokens",
        "and logits are those of PyTorch + PEFT.", "",
        f"{passed} of {len(answers)} rows pass.", "",
        "| client | version | what | |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {a.client} | {a.versions} | {a.task} | {'' if a.passed else '**fails**: '}{a.detail} |"
        for a in answers
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
